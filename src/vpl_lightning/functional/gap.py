"""The modality gap, in two readings, and the shift that closes it without learning."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def gap_centroid(prototypes: Float[Tensor, "N D"], means: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Mean over classes of the distance between a prototype and the unit mean feature of its region.

    The paper's Table 4 gives a number for the gap without its formula; this reading is our default.

    Args:
        prototypes: Unit rows.
        means: Unit rows; rows that are not finite (no region was seen) are left out.
    """
    known = means.isfinite().all(-1)
    return (prototypes[known].to(means) - means[known]).norm(dim=-1).mean()


def gap_cosine(prototypes: Float[Tensor, "N D"], means: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """One minus the mean cosine between a prototype and the mean feature of its region; the other reading."""
    known = means.isfinite().all(-1)
    return 1 - F.cosine_similarity(prototypes[known].to(means), means[known], dim=-1).mean()


def modify_gap(
    text: Float[Tensor, "C D"], features_mean: Float[Tensor, " D"], *, step: float = 1.0
) -> Float[Tensor, "C D"]:
    """Move the text prototypes towards the features by their mean difference, then back to the sphere.

    Liang et al., "Mind the Gap" (NeurIPS 2022); the baseline "Modify-gap" of the paper's Table 4.

    Args:
        text: Unit rows.
        features_mean: Mean of unit features.
        step: Share of the difference; 0 leaves the text where it is.
    """
    return F.normalize(text + step * (features_mean - text.mean(0)), dim=-1)


def mean_feature(pull: Float[Tensor, "C D"], total: float) -> Float[Tensor, " D"]:
    """Mean selected feature from the sums of features by target (rows of targets sum to one)."""
    return pull.sum(0) / max(total, torch.finfo(pull.dtype).tiny)

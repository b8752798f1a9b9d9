"""How far prototypes are from image features (the modality gap) and from one another."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError


def region_sums(
    features: Float[Tensor, "P D"], regions: Bool[Tensor, "R P"]
) -> tuple[Float[Tensor, "R D"], Float[Tensor, " R"]]:
    """Return the sum of the features of each region and their number, float64; both add up over images.

    Args:
        features: Unit rows.
        regions: Patches of each class: of the truth, or of its seeds.
    """
    members = regions.double()
    return members @ features.double(), members.sum(-1)


def gap_centroid(
    prototypes: Float[Tensor, "R D"], sums: Float[Tensor, "R D"], counts: Float[Tensor, " R"]
) -> float:
    """Return the mean distance between a prototype and the unit mean feature of its class's region.

    The paper's Table 4 names a gap without defining it; this reading is Liang et al.'s distance of means,
    class by class. Classes without a pixel are left out; nan if all are.

    Args:
        prototypes: Unit rows.
        sums: Of the features of each class (:func:`region_sums`).
        counts: Features of each class.
    """
    seen = counts > 0
    centroids = F.normalize(sums[seen].double(), dim=-1)
    return float((prototypes[seen].double() - centroids).norm(dim=-1).mean())


def gap_cos(
    prototypes: Float[Tensor, "R D"], sums: Float[Tensor, "R D"], counts: Float[Tensor, " R"]
) -> float:
    """Return one minus the mean cosine between a pixel's feature and the prototype of its class.

    The other reading of the paper's gap; nan without pixels.

    Args:
        prototypes: Unit rows.
        sums: Of the unit features of each class (:func:`region_sums`).
        counts: Features of each class.
    """
    return float(1 - (prototypes.double() * sums.double()).sum() / counts.double().sum())


def modify_gap(
    text: Float[Tensor, "C D"], image_mean: Float[Tensor, " D"], *, step: float = 1.0
) -> Float[Tensor, "C D"]:
    """Shift text prototypes towards the image features: the ``Modify-gap`` row of the paper's Table 4.

    Liang et al. (Mind the Gap, NeurIPS 2022) move every text embedding along the difference of the two means
    and normalise again; they move both sides, here the image features stay where they are.

    Args:
        text: Unit rows.
        image_mean: Mean of unit image features, not normalised.
        step: Share of the way; 0 gives text.

    Raises:
        ConfigurationError: If the step is negative.
    """
    if step < 0:
        raise ConfigurationError(f"step={step} must not be negative: it leads from text to image features")
    shift = image_mean.to(text) - text.mean(0)
    return F.normalize(text + step * shift, dim=-1)


def angle_between(first: Float[Tensor, "R D"], second: Float[Tensor, "R D"], *, centred: bool) -> float:
    """Return the largest angle between corresponding prototypes, in degrees.

    A vector added to every prototype changes neither a softmax over them nor a map made with it, and where
    the width exceeds the number of prototypes the unit sphere leaves room for such vectors: two solutions of
    phase 1 can be equally good and lie apart. ``centred`` compares what is left without it.

    Args:
        first: Prototypes.
        second: Others of the same classes.
        centred: Subtract the mean over classes first.
    """
    if centred:
        first, second = first - first.mean(0), second - second.mean(0)
    first, second = F.normalize(first.double(), dim=-1), F.normalize(second.double(), dim=-1)
    half = ((first - second).norm(dim=-1) / 2).clamp(max=1)
    return float(torch.rad2deg(2 * half.asin()).max())

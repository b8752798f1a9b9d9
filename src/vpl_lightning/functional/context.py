"""Context prototypes: what an image's own prototype has in common with those of other images (CPAL).

A reconstruction from published descriptions of CPAL (CVPR 2024) and its ancestors; the authors' code is not
out.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.gradcam import minmax

Fusion = Literal["mean", "pacam", "max"]
Shift = Literal["none", "instance", "batch"]


def instance_prototypes(
    features: Float[Tensor, "P D"], cams: Float[Tensor, "K P"], *, threshold: float
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K D"]]:
    """Masked mean of features where a map reaches a threshold.

    Returns:
        Unit rows, and the means before normalisation; both zero where no patch reaches it.
    """
    mask = (cams >= threshold).to(features)
    means = (mask @ features) / mask.sum(-1, keepdim=True).clamp(min=1)
    return F.normalize(means, dim=-1), means


def positiveness(
    anchor: Float[Tensor, " D"], contexts: Float[Tensor, "k D"], *, temperature: float, neighbours: int
) -> Float[Tensor, " k"]:
    """Weights of context prototypes: softmax of their cosines to the anchor, all but the largest set to zero.

    The ``neighbours`` largest that stay sum to one.
    """
    scores = (contexts @ anchor) / temperature
    kept = scores.topk(min(neighbours, len(scores))).indices
    weights = torch.zeros_like(scores)
    weights[kept] = scores[kept].softmax(-1)
    return weights


def feature_shift(
    kind: Shift,
    anchor: Float[Tensor, " D"],
    mean: Float[Tensor, " D"],
    centre: Float[Tensor, " D"] | None,
) -> Float[Tensor, " D"]:
    """Vector that aligns an image's dense features with a distribution of prototypes.

    Args:
        kind: ``instance`` moves the region's mean to its own unit prototype, ``batch`` to the mean prototype
            of the class over many images (the support bank: a mini-batch would make maps depend on which
            images come together).
        anchor: Instance prototype.
        mean: The same before normalisation.
        centre: Mean prototype of the class; None if no image was seen.
    """
    if kind == "none" or (kind == "batch" and centre is None):
        return torch.zeros_like(anchor)
    target = centre.to(anchor) if kind == "batch" and centre is not None else anchor
    return target - mean


def prototype_aware_cam(
    features: Float[Tensor, "P D"],
    contexts: Float[Tensor, "k D"],
    weights: Float[Tensor, " k"],
    *,
    shift: Float[Tensor, " D"],
) -> Float[Tensor, " P"]:
    """ReLU of the weighted cosines of shifted features to context prototypes."""
    return F.relu(F.normalize(features + shift, dim=-1) @ contexts.T @ weights)


def fuse(
    cams: Float[Tensor, "K h w"], aware: Float[Tensor, "K h w"], *, fusion: Fusion
) -> Float[Tensor, "K h w"]:
    """Combine maps with prototype-aware ones; scaled to [0, 1] again."""
    if fusion == "pacam":
        return minmax(aware)
    return minmax((cams + aware) / 2 if fusion == "mean" else torch.maximum(cams, aware))

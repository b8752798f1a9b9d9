"""Regional semantic contrast (RSC): the decoder's regions against vision prototypes (VPL, eq. 12 to 14).

The paper's sums run over images in one place and over classes in another; both readings are here. Masks are
made non-negative before they weigh a mean: the paper divides by a sum of raw dot products, which may be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

ContrastMode = Literal["tcl_sampled", "region_class"]
MaskKind = Literal["sigmoid", "softmax"]
Gather = Callable[[Tensor], Tensor]
"""Concatenates the rows of all ranks; gradients reach the rows of this rank."""

TEMPERATURE = 0.07
"""Divides cosines in the contrast; TCL's initial value."""
MASK_SCALE, MASK_BIAS = 10.0, -2.5
"""TCL's initial ``w`` and ``b`` of ``sigmoid(w * cosine + b)``, which learn."""
POOLING_EPSILON = 1e-6
"""Keeps the mean over an empty mask finite (TCL)."""


def region_masks(
    embedding: Float[Tensor, "B D h w"],
    prototypes: Float[Tensor, "C D"],
    *,
    kind: MaskKind = "sigmoid",
    scale: Float[Tensor, ""] | float = MASK_SCALE,
    bias: Float[Tensor, ""] | float = MASK_BIAS,
) -> Float[Tensor, "B C h w"]:
    """Return the mask of every prototype in every image, in [0, 1] (``A`` of eq. 12).

    Args:
        embedding: Unit vectors along ``D``.
        prototypes: Unit rows.
        kind: ``sigmoid(scale * cosine + bias)`` class by class as TCL has it, or a softmax of ``scale *
            cosine`` over all prototypes.
        scale: Factor of the cosines.
        bias: Added to the scaled cosines; a softmax does not see it.
    """
    logits = torch.einsum("bdhw,cd->bchw", embedding, prototypes) * scale + bias
    return logits.sigmoid() if kind == "sigmoid" else logits.softmax(1)


def pool_regions(
    embedding: Float[Tensor, "B D h w"], masks: Float[Tensor, "B R h w"]
) -> Float[Tensor, "B R D"]:
    """Return the mean embedding under each mask, scaled to unit length (``P`` of eq. 12)."""
    total = torch.einsum("brhw,bdhw->brd", masks, embedding)
    weight = masks.sum((2, 3))[..., None] + POOLING_EPSILON
    return F.normalize(total / weight, dim=-1)


def tcl_sampled(
    embedding: Float[Tensor, "B D h w"],
    prototypes: Float[Tensor, "C D"],
    masks: Float[Tensor, "B C h w"],
    present: Bool[Tensor, "B N"],
    possible: Bool[Tensor, "B N"],
    *,
    temperature: float = TEMPERATURE,
    generator: torch.Generator | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Contrast images with one class each, as TCL contrasts images with their texts: eq. 13 read literally.

    Image ``i`` draws a class ``n_i`` that it shows. ``S_ij`` is the cosine of image ``i`` pooled under the
    mask of class ``n_j`` with that class's prototype. Symmetric InfoNCE with the diagonal as positives;
    ``j`` is no negative of ``i`` if image ``i`` may show ``n_j``, which with few images a batch is frequent
    ("person"). Images that show no class take no part.

    Args:
        embedding: Unit vectors along ``D``.
        prototypes: Unit rows, the ``N`` foreground classes first.
        masks: :func:`region_masks` of them.
        present: Classes that an image shows for certain; positives are drawn from these.
        possible: Classes that it may show besides (tags of the whole image for a crop); never negatives.
        temperature: Divides the cosines.
        generator: Draws the classes, on the device of ``present``.
        gather: Joins the ranks' batches.

    Returns:
        The mean over rows and columns; zero, with zero gradients, where nothing can be contrasted.
    """
    gather = gather or _alone
    shown = present.any(1)
    weights = torch.where(shown[:, None], present, torch.ones_like(present)).float()
    drawn = torch.multinomial(weights, 1, generator=generator)[:, 0]
    classes, valid, could = gather(drawn), gather(shown), gather(possible | present)
    pooled = pool_regions(embedding, masks[:, classes])
    similarity = gather(torch.einsum("ijd,jd->ij", pooled, prototypes[classes])) / temperature
    diagonal = torch.eye(len(classes), dtype=torch.bool, device=similarity.device)
    excluded = (could[:, classes] | ~valid[:, None] | ~valid[None]) & ~diagonal
    similarity = similarity.masked_fill(excluded, -torch.inf)
    losses = similarity.logsumexp(1) + similarity.logsumexp(0) - 2 * similarity.diagonal()
    return _mean_where(losses / 2, valid)


def region_class(
    embedding: Float[Tensor, "B D h w"],
    prototypes: Float[Tensor, "C D"],
    masks: Float[Tensor, "B C h w"],
    present: Bool[Tensor, "B N"],
    *,
    temperature: float = TEMPERATURE,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Contrast every region with all classes, and every class with all regions: eq. 13 with ``n`` a class.

    Each image has a region a class that it shows. A region should be closer to its own prototype than to
    those of the other foreground classes (rows), and that prototype closer to it than to the regions of
    other classes in the batch (columns); other regions of the same class are no negatives. Works with one
    image a rank. A batch that shows one class has no column term.

    Args:
        embedding: Unit vectors along ``D``.
        prototypes: Unit rows, the ``N`` foreground classes first.
        masks: :func:`region_masks` of them.
        present: Classes that an image shows.
        temperature: Divides the cosines.
        gather: Joins the ranks' batches.

    Returns:
        The mean over regions of half the row and half the column term; zero, with zero gradients, without
        regions.
    """
    gather = gather or _alone
    num_labels = present.shape[1]
    image, label = present.nonzero(as_tuple=True)
    pooled = pool_regions(embedding, masks[:, :num_labels])[image, label]
    similarity = gather(pooled @ prototypes[:num_labels].T) / temperature
    classes: Int64[Tensor, " R"] = gather(label)
    own = similarity.gather(1, classes[:, None])[:, 0]
    rows = similarity.logsumexp(1) - own
    by_class = similarity[:, classes]
    same = classes[:, None] == classes[None]
    others = by_class.masked_fill(same, -torch.inf)
    columns = torch.cat([others, own[None]]).logsumexp(0) - own
    return _mean_where((rows + columns) / 2, torch.ones_like(classes, dtype=torch.bool))


def _mean_where(losses: Float[Tensor, " R"], valid: Bool[Tensor, " R"]) -> Float[Tensor, ""]:
    return losses.where(valid, 0).sum() / valid.sum().clamp(min=1)


def _alone(rows: Tensor) -> Tensor:
    return rows

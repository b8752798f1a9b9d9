"""Cross-entropy over pixels, with void, plain or balanced between background and foreground."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.confusion import IGNORE


def pixel_cross_entropy(
    logits: Float[Tensor, "B N+1 h w"],
    mask: Int64[Tensor, "B H W"],
    *,
    balanced: bool = False,
    ignore: int = IGNORE,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of logits, enlarged bilinearly, with the labels of pixels (VPL, eq. 14).

    A batch without any labelled pixel costs nothing and has zero gradients; torch's own mean is NaN there.

    Args:
        logits: On any grid.
        mask: Labels.
        balanced: Take half the mean over pixels of background and half that over pixels of foreground, as
            WeCLIP does. Where one of the two is missing, the other counts alone and in full; WeCLIP's loss
            is NaN there.
        ignore: Label of pixels that do not count.
    """
    logits = F.interpolate(logits, mask.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, mask, ignore_index=ignore, reduction="none")
    labelled = mask != ignore
    if not balanced:
        return _mean(losses, labelled)
    parts = [labelled & (mask == 0), labelled & (mask != 0)]
    shown = torch.stack([part.any() for part in parts]).sum()
    return torch.stack([_mean(losses, part) for part in parts]).sum() / shown.clamp(min=1)


def shown_classes(mask: Int64[Tensor, "B H W"], num_labels: int) -> Bool[Tensor, "B N"]:
    """Return which foreground classes have a pixel in each mask; void and background are none of them."""
    table = mask.new_zeros(len(mask), IGNORE + 1).bool()
    return table.scatter(1, mask.flatten(1), value=True)[:, 1 : num_labels + 1]


def _mean(losses: Float[Tensor, "B H W"], where: Bool[Tensor, "B H W"]) -> Float[Tensor, ""]:
    return losses.where(where, 0).sum() / where.sum().clamp(min=1)

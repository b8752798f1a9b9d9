"""Class-aware attention affinity of CLIP-ES: maps spread along attention, from inside their boxes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpl_lightning.functional.gradcam import minmax

SINKHORN_ROUNDS = 3
"""Divisions by column sums, then by row sums; CLIP-ES does one and then two more."""
GREY_LEVELS = 255
"""CLIP-ES thresholds the map as an 8-bit image."""


class Affinity(NamedTuple):
    """A balanced attention matrix ``diag(rows) attention diag(columns)``, never written out."""

    attention: Float[Tensor, "P P"]
    rows: Float[Tensor, "P 1"]
    columns: Float[Tensor, "P 1"]

    def symmetric(self, vectors: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """Multiply by the mean of the balanced matrix and its transpose."""
        forward = self.rows * (self.attention @ (self.columns * vectors))
        backward = self.columns * (self.attention.mT @ (self.rows * vectors))
        return (forward + backward) / 2


def balance(attention: Float[Tensor, "P P"], *, rounds: int = SINKHORN_ROUNDS) -> Affinity:
    """Sinkhorn rounds on the attention among patches; a round divides by column sums, then by row sums.

    A patch that no patch looks at, or that looks at the class token alone, would divide by zero; it neither
    sends nor receives along its empty line.

    Args:
        attention: Mean of the attention maps of the last blocks, class token removed; rows are queries.
        rounds: As the released code does them, too few to converge.
    """
    rows = attention.new_ones(len(attention), 1)
    columns = attention.new_ones(len(attention), 1)
    smallest = torch.finfo(attention.dtype).tiny
    for _ in range(rounds):
        columns = 1 / (attention.mT @ rows).clamp_min(smallest)
        rows = 1 / (attention @ columns).clamp_min(smallest)
    return Affinity(attention, rows, columns)


def box_mask(cam: npt.NDArray[np.float32], *, threshold: float) -> npt.NDArray[np.bool_]:
    """Union of the bounding boxes of the connected regions of a thresholded map.

    The released code takes the boxes of OpenCV's contours; inner contours lie inside outer ones, so the boxes
    of the 8-connected components have the same union. It clips a box's exclusive end to the last index, so
    that the last row and column of the grid are never inside: kept, because it is part of the published
    numbers.

    Args:
        cam: ``(h, w)`` in [0, 1].
        threshold: lambda: a patch counts strictly above ``int(lambda * maximum)`` grey levels.
    """
    from scipy import ndimage

    grey = (cam * GREY_LEVELS).astype(np.uint8)
    labels, _ = ndimage.label(grey > int(threshold * int(grey.max())), structure=np.ones((3, 3)))
    mask = np.zeros(cam.shape, bool)
    bottom, right = cam.shape[0] - 1, cam.shape[1] - 1
    for down, across in ndimage.find_objects(labels):
        mask[down.start : min(down.stop, bottom), across.start : min(across.stop, right)] = True
    return mask


def box_masks(cams: Float[Tensor, "K h w"], *, threshold: float) -> Bool[Tensor, "K h w"]:
    """Return :func:`box_mask` of each map."""
    masks = [box_mask(cam, threshold=threshold) for cam in cams.cpu().numpy()]
    return torch.from_numpy(np.stack(masks)).to(cams.device)


def refine_cams(
    cams: Float[Tensor, "K h w"], affinity: Affinity, *, threshold: float
) -> Float[Tensor, "K h w"]:
    """Spread each map twice along the symmetric affinity, from inside its boxes; scaled to [0, 1].

    The square of the matrix is never formed: two thin products serve all classes. A map without a patch in
    a box stays zero, as in the released code.

    Args:
        cams: In [0, 1].
        affinity: Of the image.
        threshold: lambda of the boxes; CLIP-ES: 0.4 on VOC, 0.7 on COCO.
    """
    sources = (cams * box_masks(cams, threshold=threshold)).flatten(1).T
    spread = affinity.symmetric(affinity.symmetric(sources))
    return minmax(spread.T.reshape(cams.shape))

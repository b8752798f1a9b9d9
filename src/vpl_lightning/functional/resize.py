"""Bilinear resizing without torch, for the processes that make masks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int64


def resize_bilinear(maps: Float[np.ndarray, "K r s"], size: tuple[int, int]) -> Float32[np.ndarray, "K H W"]:
    """Resize maps with half-pixel centres and no antialiasing.

    Equal to ``F.interpolate(mode="bilinear", align_corners=False)`` and, when enlarging, to ``cv2.resize``,
    with which CLIP-ES's `generate_cams_voc12.py` brings its maps to image size.

    Args:
        maps: Any grid.
        size: ``(H, W)``.
    """
    maps = np.asarray(maps, np.float32)
    if maps.shape[1:] == tuple(size):
        return maps
    low, high, share = _taps(maps.shape[1], size[0])
    maps = maps[:, low] * (1 - share)[:, None] + maps[:, high] * share[:, None]
    low, high, share = _taps(maps.shape[2], size[1])
    resized: Float32[np.ndarray, "K H W"] = maps[:, :, low] * (1 - share) + maps[:, :, high] * share
    return resized


def _taps(
    old: int, new: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    centre = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(centre.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), (centre - low).astype(np.float32)

"""From decoded images to what CLIP sees: size, scale, statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vpl_lightning.structures import ImageArray

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the RGB channels in [0, 1], OpenAI's CLIP."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the RGB channels in [0, 1], OpenAI's CLIP."""

ResizedArray = UInt8[np.ndarray, "Hp Wp 3"]
"""An image whose sides are multiples of the patch size."""


def pixel_statistics(visual: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that a vision tower carries, else those of OpenAI's CLIP."""
    mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    return tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Return ``(h, w)`` in patches of an image, each side rounded up (CLIP-ES ``generate_cams_voc12.py``)."""
    return math.ceil(height / patch_size), math.ceil(width / patch_size)


def resize_to_patches(image: ImageArray, patch_size: int) -> ResizedArray:
    """Resize an image so that each side is a patch multiple, rounded up.

    The aspect ratio may change a little. PIL's antialiased bicubic filter on the decoded bytes, as CLIP-ES
    does before it normalises. Needs no encoder, so that data-loader workers can call it.

    Returns:
        A new array, a copy when the size fits already.
    """
    height, width, _ = image.shape
    h, w = patch_grid(height, width, patch_size)
    size = (w * patch_size, h * patch_size)
    if size == (width, height):
        return image.copy()
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)).copy()


def normalise_pixels(
    images: UInt8[np.ndarray, "B H W 3"] | UInt8[Tensor, "B 3 H W"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> Float[Tensor, "B 3 H W"]:
    """Scale bytes to [0, 1], then by mean and standard deviation of the channels.

    Args:
        images: Bytes.
        mean: Of each channel in [0, 1].
        std: Of each channel in [0, 1].
        device: Where the bytes are sent before they become floats.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
    pixels = pixels.to(device).float() / 255
    middle, spread = (pixels.new_tensor(part)[:, None, None] for part in (mean, std))
    return (pixels - middle) / spread

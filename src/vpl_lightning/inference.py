"""Whole images through a decoder: scales, flips, a dense CRF (WeCLIP's `test_msc_flip_voc.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.crf import CRFConfig, crf_config, dense_crf

CRF_FLOOR = 0.05
"""Classes that reach this probability nowhere and win nowhere stay out of the CRF, whose time grows with
its labels."""

CRF_PIXELS = 2**21
"""Larger images go through the CRF at this many pixels: four times VOC's and COCO's largest, 2 GB at 20
labels."""
STRIP_VALUES = 2**24
"""Scores of an enlarged map that are in memory at once."""

Segment = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B C h w"]]
"""Logits on the patch grid of normalised images whose sides are patch multiples."""


@dataclass(frozen=True, kw_only=True)
class InferenceSpec:
    """How whole images are segmented. The defaults are WeCLIP's protocol, its commented-out CRF included.

    Attributes:
        scales: Factors on the image's size; logits are averaged on the patch grid of scale 1.
        flip: Average with the left-right mirrored image too.
        long_side: Resize the longer side to so many pixels first; None keeps the image's size. Sides are
            then rounded up to a patch multiple, where WeCLIP cuts off what exceeds one.
        crf: Preset or constants of a dense CRF on the result; None for none.
    """

    scales: tuple[float, ...] = (1.0, 0.75)
    flip: bool = True
    long_side: int | None = 512
    crf: str | CRFConfig | None = "weclip"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ConfigurationError(f"scales={list(self.scales)} must be positive factors, at least one")
        if self.long_side is not None and self.long_side < 1:
            raise ConfigurationError(f"long_side={self.long_side} must be a number of pixels, or null")
        if self.crf is not None:
            crf_config(self.crf)


def scaled_size(
    size: tuple[int, int], *, long_side: int | None, scale: float, patch_size: int
) -> tuple[int, int]:
    """Return the size in pixels at which an image is encoded: each side rounded up to whole patches."""
    factor = scale * (1 if long_side is None else long_side / max(size))
    height, width = (max(1, ceil(round(side * factor) / patch_size)) * patch_size for side in size)
    return height, width


def segment_image(
    segment: Segment, pixels: Float[Tensor, "3 H W"], *, patch_size: int, spec: InferenceSpec
) -> Float[Tensor, "C h w"]:
    """Return the logits of one image on the patch grid of scale 1, averaged over scales and flips.

    Resizing is bilinear, with antialiasing where it shrinks; WeCLIP does without.

    Args:
        segment: The model.
        pixels: A normalised image.
        patch_size: Of the model.
        spec: The protocol; its CRF is not applied here.
    """
    height, width = pixels.shape[1:]
    sizes = [
        scaled_size((height, width), long_side=spec.long_side, scale=scale, patch_size=patch_size)
        for scale in (1.0, *spec.scales)
    ]
    grid = (sizes[0][0] // patch_size, sizes[0][1] // patch_size)
    parts = []
    for size in sizes[1:]:
        view = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)
        if spec.flip:
            plain, mirrored = segment(torch.cat([view, view.flip(3)])).chunk(2)
            logits = (plain + mirrored.flip(3)) / 2
        else:
            logits = segment(view)
        parts.append(F.interpolate(logits.float(), grid, mode="bilinear", align_corners=False)[0])
    return torch.stack(parts).mean(0)


def label_image(scores: Float[Tensor, "C h w"], size: tuple[int, int]) -> UInt8[Tensor, "H W"]:
    """Return the class with the highest score in each pixel, scores enlarged bilinearly to ``(H, W)``."""
    return torch.cat([strip.argmax(0).to(torch.uint8) for strip in _enlarged(scores, size)])


def image_probabilities(logits: Float[Tensor, "C h w"], size: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """Return the softmax of logits that are enlarged bilinearly to ``(H, W)``."""
    return torch.cat([strip.softmax(0) for strip in _enlarged(logits, size)], dim=1)


def refine_prediction(
    image: UInt8[np.ndarray, "H W 3"], logits: Float[Tensor, "C h w"], crf: str | CRFConfig
) -> Float[Tensor, "C H W"]:
    """Refine the prediction for one image with a dense CRF over the classes that may matter.

    Background always takes part. Classes below :data:`CRF_FLOOR` everywhere that win nowhere get
    probability 0.

    Args:
        image: As decoded.
        logits: On any grid, background first.
        crf: Preset or constants.

    Returns:
        Probabilities at the image's size; at the same shape with :data:`CRF_PIXELS` pixels if it has more.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, sqrt(CRF_PIXELS / (height * width)))
    if shrink < 1:
        height, width = max(1, int(height * shrink)), max(1, int(width * shrink))
        image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    probabilities = image_probabilities(logits, (height, width)).cpu().numpy()
    kept = probabilities.max((1, 2)) >= CRF_FLOOR
    kept[np.unique(probabilities.argmax(0))] = True
    kept[0] = True
    refined = torch.zeros(probabilities.shape)
    refined[torch.from_numpy(kept)] = torch.from_numpy(dense_crf(image, probabilities[kept], crf))
    return refined


def enlarge(scores: Float[Tensor, "C h w"], size: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """Return scores enlarged bilinearly to ``(H, W)``."""
    return torch.cat(list(_enlarged(scores, size)), dim=1)


def _enlarged(scores: Float[Tensor, "C h w"], size: tuple[int, int]) -> Iterator[Float[Tensor, "C rows W"]]:
    """Enlarge a few rows at a time: whole maps of a large photograph would take gigabytes."""
    if tuple(scores.shape[1:]) == tuple(size):
        yield scores
        return
    down, across = (_interpolation(old, new, scores) for old, new in zip(scores.shape[1:], size, strict=True))
    wide = scores @ across
    rows = max(1, STRIP_VALUES // (len(scores) * size[1]))
    for strip in torch.split(down, rows, dim=1):
        yield strip.T @ wide


def _interpolation(old: int, new: int, like: Tensor) -> Float[Tensor, "old new"]:
    identity = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], new, mode="linear", align_corners=False)[0]

"""Random views of an image together with its mask for phase 2 (albumentations)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vpl_lightning.data.images import MaskArray
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.labels import VOID
from vpl_lightning.structures import ImageArray

View = tuple[UInt8[np.ndarray, "S S 3"], UInt8[np.ndarray, "S S"]]
"""A square view of an image and of its mask."""
CLIP_MEAN_RGB = (123, 117, 104)
"""CLIP's mean colour (0.4815, 0.4578, 0.4082) in 8 bits: padding is near zero once an encoder has "
"normalised it."""


@dataclass(frozen=True)
class Augmentation:
    """What the random views of phase 2 vary. The defaults are WeCLIP's scales and flips (reference.md 4.4).

    Attributes:
        scale_min: Smallest factor on both sides of the image.
        scale_max: Largest factor.
        flip: Probability of a left-right flip.
        jitter: Strength of brightness, contrast and saturation changes, 0 to 1; hue changes by a quarter of
            it.
    """

    scale_min: float = 0.5
    scale_max: float = 2.0
    flip: float = 0.5
    jitter: float = 0.0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 < self.scale_min <= self.scale_max:
            raise ConfigurationError(
                f"augmentation: scale_min={self.scale_min} and scale_max={self.scale_max} must be positive "
                "and in order"
            )
        for key in ("flip", "jitter"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigurationError(f"augmentation.{key}={getattr(self, key)} must lie between 0 and 1")


class RandomView:
    """Scales, flips, crops and pads an image and its mask alike.

    Padding is :data:`CLIP_MEAN_RGB` in the image and void in the mask, never class 0. Masks are resampled by
    nearest neighbour, images bilinearly, by area when they shrink. The same key always gives the same view,
    in any process.

    Args:
        size: Side of the square view in pixels.
        augmentation: What varies.
    """

    def __init__(self, size: int, augmentation: Augmentation) -> None:
        if size < 1:
            raise ConfigurationError(f"crop_size={size} must be at least 1")
        self.size = size
        self.augmentation = augmentation
        self._pipeline: Any = None

    def __call__(self, image: ImageArray, mask: MaskArray, *, key: tuple[int, ...]) -> View:
        """Return one view.

        Args:
            image: RGB.
            mask: Label map of the same size.
            key: Non-negative numbers that seed the view, such as seed, epoch and row.
        """
        if self._pipeline is None:
            self._pipeline = build_pipeline(self.size, self.augmentation)
        # One stream a transform: Compose.set_random_seed gives all the same, which ties the flip to the
        # scale.
        seeds = np.random.SeedSequence(key).generate_state(len(self._pipeline.transforms))
        for transform, seed in zip(self._pipeline.transforms, seeds, strict=True):
            transform.set_random_seed(int(seed))
        view = self._pipeline(image=image, mask=mask)
        return np.ascontiguousarray(view["image"]), np.ascontiguousarray(view["mask"])

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Travel to workers as settings; each builds its own pipeline."""
        return RandomView, (self.size, self.augmentation)


def build_pipeline(size: int, augmentation: Augmentation) -> Any:
    """Return the albumentations pipeline of :class:`RandomView`."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for news
    import albumentations as A
    import cv2

    padding: dict[str, Any] = {"border_mode": cv2.BORDER_CONSTANT, "fill": CLIP_MEAN_RGB, "fill_mask": VOID}
    # One pixel must survive the smallest scale.
    smallest = floor(1 / augmentation.scale_min) + 1
    steps: list[Any] = [
        A.PadIfNeeded(min_height=smallest, min_width=smallest, **padding),
        A.RandomScale(
            scale_limit=(augmentation.scale_min - 1, augmentation.scale_max - 1),
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            area_for_downscale="image",
            p=1,
        ),
        A.HorizontalFlip(p=augmentation.flip),
        A.RandomCrop(size, size, pad_if_needed=True, pad_position="random", **padding),
    ]
    if augmentation.jitter > 0:
        span = (1 - augmentation.jitter, 1 + augmentation.jitter)
        hue = augmentation.jitter / 4
        steps.append(A.ColorJitter(brightness=span, contrast=span, saturation=span, hue=(-hue, hue), p=1))
    return A.Compose(steps)

"""What the small CLIP for photographs is trained on: some patches of an image, and a caption of its tags."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from photo_clip import PATCH_SIZE, STEM_MEAN, STEM_STD, PhotoCLIPConfig, build_photo_clip
from PIL import Image
from torch import Tensor

from vpl_lightning.clip import ClassSet
from vpl_lightning.data.images import TaggedImages
from vpl_lightning.structures import ImageArray

TEMPLATES = (
    "a clean origami {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "itap of a {}.",
    "art of the {}.",
    "{}.",
)
JOINTS = (" and ", " and a ", ", ")
BACKGROUND = -1
"""Tag of a view that shows only the border."""
BORDER = 2
"""Patches along each side of an image that such a view may show."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of one training.

    Attributes:
        steps: Optimiser steps.
        batch: Views a step.
        kept: Share of an image's patches that a view shows.
        rate: AdamW's highest learning rate; cosine after the warm-up.
        decay: Weight decay of the matrices.
        scales: Logit scale at the first and the last step, geometric in between. CLIP learns it from 1 / 0.07
            up to 100; in so few steps it would not get beyond the second.
        background: Share of views that show only the border.
        single: Share of captions that name one tag alone.
    """

    steps: int = 160
    batch: int = 96
    kept: float = 0.3
    rate: float = 1e-3
    decay: float = 0.2
    scales: tuple[float, float] = (1 / 0.07, 30.0)
    background: float = 0.1
    single: float = 0.5


class View(NamedTuple):
    """Some patches of an image."""

    features: Float[Tensor, "Q F"]
    places: Int[Tensor, " Q"]
    tags: frozenset[int]


class StemFeatures:
    """What the frozen stem makes of every training image and its mirror image, half precision, in RAM.

    Args:
        images: Images with their tags.
        config: Sizes of the model.
    """

    def __init__(self, images: TaggedImages, config: PhotoCLIPConfig) -> None:
        stem = build_photo_clip(config).visual.conv1
        mean, std = (torch.tensor(part)[:, None, None] for part in (STEM_MEAN, STEM_STD))
        self.grid = config.grid
        self.tags = [frozenset(images.labels(row)) for row in range(len(images))]
        found = []
        with torch.no_grad():
            for row in range(len(images)):
                pixels = torch.from_numpy(squeeze(images[row]["image"], config.grid)).permute(2, 0, 1)
                pixels = (pixels.float() / 255 - mean) / std
                both = stem.features(torch.stack([pixels, pixels.flip(-1)]))
                found.append(both.flatten(2).transpose(1, 2).half())
        self.features = torch.stack(found)

    def statistics(self) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
        """Return mean and standard deviation of each channel."""
        means = torch.stack([image.double().mean((0, 1)) for image in self.features])
        squares = torch.stack([image.double().square().mean((0, 1)) for image in self.features])
        mean = means.mean(0)
        return mean.float(), (squares.mean(0) - mean.square()).clamp_min(1e-6).sqrt().float()

    def view(self, row: int, settings: Training, draw: random.Random) -> View:
        """Draw a view of an image: some of its patches, in place; rarely shuffled, or of the border alone."""
        features = self.features[row, draw.randrange(2)]
        total = self.grid**2
        count = round(total * settings.kept)
        kind = draw.random()
        if kind < settings.background:
            patches = draw.choices(self._border(), k=count)
            return View(
                features[patches], torch.tensor(draw.sample(range(total), count)), frozenset([BACKGROUND])
            )
        patches = draw.sample(range(total), count)
        shuffled = kind < 2 * settings.background
        places = draw.sample(range(total), count) if shuffled else patches
        return View(features[patches], torch.tensor(places), self.tags[row])

    def _border(self) -> list[int]:
        rows, columns = np.divmod(np.arange(self.grid**2), self.grid)
        inner = (np.minimum(rows, columns) >= BORDER) & (np.maximum(rows, columns) < self.grid - BORDER)
        return list(np.flatnonzero(~inner))


def caption(
    tags: frozenset[int], classes: ClassSet, settings: Training, draw: random.Random
) -> tuple[str, frozenset[int]]:
    """Return a caption and the tags that it names."""
    named = sorted(tags)
    draw.shuffle(named)
    if draw.random() < settings.single:
        named = named[:1]
    names = {tag: (classes.foreground[tag], classes.prompts[tag]) for tag in named if tag != BACKGROUND}
    words = [draw.choice(names.get(tag, classes.background)) for tag in named]
    return draw.choice(TEMPLATES).format(draw.choice(JOINTS).join(words)), frozenset(named)


def squeeze(image: ImageArray, grid: int) -> ImageArray:
    """Resize an image to a square of ``grid`` patches a side."""
    side = grid * PATCH_SIZE
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))

"""A data set of coloured squares, and a phase 1 that has nothing left to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import tiny_clip
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.data import Augmentation, Entry, SegmentationDataModule, TaggedIndex
from vpl_lightning.data.images import ImageSource, MaskSource
from vpl_lightning.tasks import (
    DecoderModule,
    DecoderSpec,
    InferenceSpec,
    LossSpec,
    OptimizerSpec,
    SegmentationTask,
)

LAST = "decoder/checkpoints/last.ckpt"
"""In a run folder."""
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 230))
CLASSES = ClassSet(
    name="squares",
    foreground=("red", "green", "blue"),
    prompts=("red", "green", "blue"),
    background=("grey", "wall"),
    templates=("a {}.",),
    box_threshold=0.4,
)
SMALL = DecoderSpec(width=32, blocks=1, heads=2, dropout=0.1)
FAST = OptimizerSpec(preset="adamw", lr=5e-3)
PLAIN = InferenceSpec(scales=(1.0,), flip=False, long_side=None, crf=None)


class Squares(ImageSource, MaskSource):
    """One or two coloured squares on grey noise, a function of the id."""

    def _draw(self, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(int(entry.id))
        image = generator.integers(90, 130, (40, 48, 3), dtype=np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        for column, label in zip((2, 26), entry.labels, strict=False):
            top = int(generator.integers(2, 18))
            area = (slice(top, top + 18), slice(column, column + 18))
            image[area] = np.clip(COLOURS[label] + generator.normal(0, 8, (18, 18, 3)), 0, 255)
            mask[area] = label + 1
        return image, mask

    def image(self, entry: Entry) -> np.ndarray:
        return self._draw(entry)[0]

    def mask(self, entry: Entry) -> np.ndarray:
        return self._draw(entry)[1]


class SquaresDataModule(SegmentationDataModule):
    """Ten training images by default, seven to score."""

    def __init__(
        self,
        *,
        train: int = 10,
        val: int = 7,
        num_workers: int = 0,
        predict: str = "val",
        classes: ClassSet = CLASSES,
    ):
        super().__init__(
            classes=classes,
            splits={},
            predict=predict,
            batch_size=3,
            num_workers=num_workers,
            crop_size=32,
            on_bad_image="raise",
            augmentation=Augmentation(scale_min=0.8, scale_max=1.2),
            seed=0,
        )
        self.counts = {"train": train, "val": val, "test": 7}
        self.use_true_masks()

    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        first = {"train": 0, "val": 1000, "test": 2000}[split]
        rows = range(first, first + self.counts[split])
        return TaggedIndex.of(Entry(str(i), str(i), sorted({i % 3, (i // 3) % 3})) for i in rows)

    def image_source(self, split: str) -> ImageSource:
        return Squares()

    def mask_source(self, split: str) -> MaskSource:
        return Squares()


class StandIn(SegmentationTask):
    """Offers what phase 2 needs of phase 1."""

    stage = "stand-in"

    def __init__(self, *, encoder: CLIPEncoder | None = None, seed: int = 0) -> None:
        super().__init__()
        self.hold(encoder=encoder or CLIPEncoder(tiny_clip()))
        self.seed = seed

    def attach(self, classes: ClassSet) -> None:
        self.classes = classes

    @property
    def prototypes(self) -> Tensor:
        count = len(self.classes.foreground) + len(self.classes.background)
        generator = torch.Generator().manual_seed(self.seed)
        return F.normalize(torch.randn(count, self.encoder.joint_width, generator=generator), dim=1)


def module(localiser: StandIn | None = None, **settings: Any) -> DecoderModule:
    settings = {"decoder": SMALL, "optimizer": FAST, "evaluation": PLAIN, "losses": LossSpec(), **settings}
    return DecoderModule(localiser or StandIn(), **settings)

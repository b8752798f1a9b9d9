"""The drawn scenes as a data set that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vpl_lightning.clip import ClassSet
from vpl_lightning.data.base import SegmentationDataModule
from vpl_lightning.data.checks import OnBadImage
from vpl_lightning.data.images import ImageSource, MaskArray, MaskSource
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.data.scenes import CLASSES, Scene, render_scene
from vpl_lightning.data.transforms import Augmentation
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.structures import ImageArray

SCENE_SIZE = 112
"""Side of a scene in pixels."""
SERIES = {"train": 0, "val": 1, "test": 2}
"""Series of scenes of a split, offset by ``SPLITS * seed``: no two splits of any seeds share a scene."""
SPLITS = len(SERIES)
FIRST_SERIES = 1_000_000
"""Series below are left to whoever trains a CLIP on scenes, so that nothing is scored on what CLIP has "
"seen."""
SCENES_IN_MEMORY = 4096
"""Scenes that a process keeps, about 50 kB each."""


@dataclass(frozen=True)
class SceneSource(ImageSource, MaskSource):
    """Draws the scenes of one series.

    Attributes:
        series: Seed of the series.
        size: Side in pixels.
    """

    series: int
    size: int = SCENE_SIZE

    def image(self, entry: Entry) -> ImageArray:
        """Draw a scene's image."""
        return self._scene(entry).image.copy()

    def mask(self, entry: Entry) -> MaskArray:
        """Draw a scene's exact mask."""
        return self._scene(entry).mask.copy()

    def _scene(self, entry: Entry) -> Scene:
        return cached_scene(self.series, int(entry.file), self.size)


class ShapesDataModule(SegmentationDataModule):
    """Procedurally drawn scenes of everyday things with exact masks.

    Splits are disjoint series, and disjoint between seeds; tags are what a scene's mask shows.

    Args:
        train_images: Scenes to train on.
        val_images: Scenes that ``validate`` scores.
        test_images: Scenes that ``test`` scores.
        seed: Changes every scene, and the orders and views of training.
        size: Side of a scene in pixels.
        predict: A split, an image file, or a folder of images.
        batch_size: Training views a process.
        num_workers: Worker processes of a loader.
        crop_size: Side of the training views in pixels.
        on_bad_image: See :class:`SegmentationDataModule`.
        augmentation: What training views vary.
        train_masks: None, a folder of masks for phase 2, or ``truth``.
    """

    def __init__(
        self,
        *,
        train_images: int = 600,
        val_images: int = 200,
        test_images: int = 500,
        seed: int = 0,
        size: int = SCENE_SIZE,
        predict: str = "val",
        batch_size: int = 16,
        num_workers: int = 0,
        crop_size: int = 96,
        on_bad_image: OnBadImage = "raise",
        augmentation: Augmentation | None = None,
        train_masks: str | None = None,
        classes: ClassSet | str = "shapes",
    ) -> None:
        super().__init__(
            classes=classes,
            splits={},
            predict=predict,
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            on_bad_image=on_bad_image,
            augmentation=augmentation,
            seed=seed,
        )
        self.counts = {"train": train_images, "val": val_images, "test": test_images}
        for split, count in self.counts.items():
            if count < 1:
                raise ConfigurationError(f"data.{split}_images={count} must be at least 1")
        if size < 1:
            raise ConfigurationError(f"data.size={size} must be at least 1")
        if self.classes.foreground != CLASSES:
            raise ConfigurationError(
                f"data.classes: the scenes show {', '.join(CLASSES)}, the class set '{self.classes.name}' "
                f"has {', '.join(self.classes.foreground)}; keep the names and change texts through prompts"
            )
        self.size = size
        self.choose_training_masks(train_masks)

    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        """Draw the scenes of a split once, and note what they show."""
        del labelled
        source = self.image_source(split)
        entries = []
        for number in range(self.counts[split]):
            labels = cached_scene(source.series, number, source.size).labels
            entries.append(Entry(f"{split}_{number:06d}", str(number), list(labels)))
        return TaggedIndex.of(entries)

    def image_source(self, split: str) -> SceneSource:
        """Return the series of a split.

        Raises:
            ConfigurationError: If there is no such split.
        """
        if split not in SERIES:
            raise ConfigurationError(f"unknown split '{split}'; drawn scenes have {', '.join(SERIES)}")
        return SceneSource(FIRST_SERIES + SPLITS * self.seed + SERIES[split], self.size)

    def mask_source(self, split: str) -> SceneSource:
        """Return the series of a split, whose masks are exact."""
        return self.image_source(split)


@lru_cache(maxsize=SCENES_IN_MEMORY)
def cached_scene(series: int, number: int, size: int) -> Scene:
    """Draw a scene, or return it from memory."""
    return render_scene(series, number, size=size)

"""The data module that every data set fills: loaders for phase 1, phase 2, scoring and predicting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from vpl_lightning.artifacts import fingerprint
from vpl_lightning.clip import ClassSet, class_set
from vpl_lightning.data.batches import (
    EvaluationCollator,
    EvaluationLoader,
    TrainingBatch,
    TrainingCollator,
    TrainingViews,
)
from vpl_lightning.data.checks import OnBadImage, named, ranks, tagged_only, usable
from vpl_lightning.data.images import ImageSource, MaskFolder, MaskSource, Sample, TaggedImages
from vpl_lightning.data.index import TaggedIndex
from vpl_lightning.data.listing import list_images
from vpl_lightning.data.samplers import TrainingSampler, own_rows, seed_worker
from vpl_lightning.data.transforms import Augmentation, RandomView
from vpl_lightning.errors import ConfigurationError, DataError

ROLES = ("train", "val", "test")


class SegmentationDataModule(LightningDataModule, ABC):
    """Images, tags and masks of a data set in its splits.

    A data set says what its splits hold (:meth:`read_index`) and where files are (:meth:`image_source`,
    :meth:`mask_source`); all loaders are here. Splits go by their role, ``train``, ``val`` or ``test``; any
    other name is the data set's own.

    Args:
        classes: Class set, or its name.
        splits: The data set's own names of the roles ``train``, ``val`` and ``test``.
        predict: What ``predict`` reads: a split by the data set's own name, an image file, or a folder.
        batch_size: Training views a process.
        num_workers: Worker processes of a loader.
        crop_size: Side of the square training views in pixels.
        on_bad_image: What to do about images that cannot be read, see
            :data:`vpl_lightning.data.checks.OnBadImage`.
        augmentation: What training views vary.
        seed: Orders and views of training.

    Raises:
        ConfigurationError: If a setting is impossible.
    """

    def __init__(
        self,
        *,
        classes: ClassSet | str,
        splits: dict[str, str],
        predict: str,
        batch_size: int,
        num_workers: int,
        crop_size: int,
        on_bad_image: OnBadImage,
        augmentation: Augmentation | None,
        seed: int,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "num_workers": num_workers, "crop_size": crop_size, "seed": seed}
        for key, value in numbers.items():
            least = 1 if key in ("batch_size", "crop_size") else 0
            if value < least:
                raise ConfigurationError(f"data.{key}={value} must be at least {least}")
        if on_bad_image not in ("raise", "skip", "list"):
            raise ConfigurationError(
                f"data.on_bad_image='{on_bad_image}' is unknown; choose raise, skip or list"
            )
        self.classes = class_set(classes)
        self.splits = splits
        self.predict = predict
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.crop_size = crop_size
        self.on_bad_image = on_bad_image
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self._training_masks: MaskSource | None = None
        self._datasets: dict[tuple[str, str], TaggedImages] = {}

    @property
    def num_classes(self) -> int:
        """``N + 1``: the classes of a mask, background included."""
        return self.classes.num_classes

    @abstractmethod
    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        """Read what a split of the data set holds.

        Args:
            split: The data set's own name.
            labelled: Whether missing tags are an error; the images of a test server have none.

        Raises:
            ConfigurationError: If the split does not exist; names those that do.
            DataError: If a list or a file of tags is missing or wrong; names it.
        """

    @abstractmethod
    def image_source(self, split: str) -> ImageSource:
        """Return where the images of a split are."""

    @abstractmethod
    def mask_source(self, split: str) -> MaskSource | None:
        """Return where the true masks of a split are, or None if it has none."""

    def localisation_dataset(self, split: str = "train") -> TaggedImages:
        """Return the images of a split with their tags, without masks: the input of phase 1.

        Raises:
            DataError: If an image has no tag, unless such images are left out (``on_bad_image="skip"``).
        """
        return self._dataset(self.splits.get(split, split), "tags")

    def evaluation_dataset(self, split: str = "val") -> TaggedImages:
        """Return the images of a split with their true masks; masks are None if the split has none."""
        return self._dataset(self.splits.get(split, split), "truth")

    def training_dataset(self) -> TaggedImages:
        """Return the images of the training split with the masks that phase 2 learns from.

        Raises:
            ConfigurationError: If nobody has said where the masks are.
            DataError: If an image has no mask; names the first ones.
        """
        if self._training_masks is None:
            raise ConfigurationError(
                "phase 2 needs training masks: run 'vpl fit' with the whole method, or set data.train_masks "
                "to a folder of <id>.png, or to 'truth' for an upper bound"
            )
        tagged = self.localisation_dataset("train")
        images = TaggedImages(tagged.index, tagged.images, self._training_masks)
        missing = images.missing_files()
        if missing:
            names = f"{named(list(map(str, missing)))}; remove the folder to have all made again"
            raise DataError(f"{len(missing)} of {len(tagged)} training images have no mask: {names}")
        return images

    def use_pseudo_masks(self, folder: str | Path) -> None:
        """Train phase 2 on the masks ``<id>.png`` of a folder."""
        self._training_masks = MaskFolder(
            Path(folder), self.num_classes, fix="remove the folder to have the masks made again"
        )

    def use_true_masks(self) -> None:
        """Train phase 2 on the truth: full supervision, an upper bound.

        Raises:
            ConfigurationError: If the training split has no true masks.
        """
        masks = self.mask_source(self.splits.get("train", "train"))
        if masks is None:
            raise ConfigurationError("data.train_masks='truth': the training split has no true masks")
        self._training_masks = masks

    def choose_training_masks(self, value: str | None) -> None:
        """Apply the setting ``train_masks``: None (phase 2 will be told), ``truth``, or a folder."""
        if value == "truth":
            self.use_true_masks()
        elif value is not None:
            if not Path(value).is_dir():
                raise ConfigurationError(
                    f"data.train_masks='{value}' is no folder; give one with <id>.png, or 'truth'"
                )
            self.use_pseudo_masks(value)

    def fingerprint(self, split: str = "train") -> str:
        """Return a SHA-256 of the ids, files and tags that a split holds and of the class names."""
        return fingerprint(
            [list(self.classes.foreground), self.localisation_dataset(split).index.fingerprint()]
        )

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs, so that what is missing is missed at the start."""
        if stage in ("fit", None):
            self.localisation_dataset("train")
        if stage in ("fit", "validate", None):
            self.evaluation_dataset("val")
        if stage in ("test", None):
            self.evaluation_dataset("test")
        if stage == "predict":
            self._prediction_dataset()

    def localisation_dataloader(
        self, batch_size: int, *, skip: Collection[str] = frozenset(), split: str = "train"
    ) -> DataLoader[list[Sample]]:
        """Return this rank's share of :meth:`localisation_dataset` as lists of samples, each image once.

        Args:
            batch_size: Samples a list.
            skip: Ids that an earlier run has done.
            split: Role or name.
        """
        images = self.localisation_dataset(split).without(frozenset(skip))
        return self._loader(images, batch_size=batch_size, sampler=own_rows(len(images)), collate_fn=list)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return what the task at hand trains on: its own loader if it brings one, else views with masks."""
        return self._loader_of_task("training_loader") or self.views_dataloader()

    def views_dataloader(self) -> DataLoader[TrainingBatch]:
        """Return shuffled random views with masks."""
        images = self.training_dataset()
        rank, world_size = ranks()
        sampler = TrainingSampler(len(images), seed=self.seed, rank=rank, world_size=world_size)
        if not len(sampler):
            raise ConfigurationError(
                f"{len(images)} training images, {world_size} processes; use fewer devices"
            )
        return self._loader(
            TrainingViews(images, RandomView(self.crop_size, self.augmentation), seed=self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            collate_fn=TrainingCollator(self.num_classes - 1),
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Return this rank's share of the validation split with its truth; no loader without any truth."""
        images = self.evaluation_dataset("val")
        return [] if images.masks is None else self._evaluation_loader(images)

    def test_dataloader(self) -> EvaluationLoader:
        """Return this rank's share of the test split, whole images with their truth.

        Raises:
            ConfigurationError: If there is no truth to score against.
        """
        images = self.evaluation_dataset("test")
        if images.masks is None:
            split = self.splits.get("test", "test")
            raise ConfigurationError(f"split '{split}' has no true masks; set data.masks, or run predict")
        return self._evaluation_loader(images)

    def predict_dataloader(self) -> Any:
        """Return this rank's share of what ``predict`` names: a split, one image, or a folder of images.

        A task that predicts from something else, as phase 1 does, brings its own loader.
        """
        return self._loader_of_task("prediction_loader") or self._evaluation_loader(
            self._prediction_dataset()
        )

    def _loader_of_task(self, name: str) -> Any:
        task = None if self.trainer is None else self.trainer.lightning_module
        own = getattr(task, name, None)
        return None if own is None else own(self)

    def _prediction_dataset(self) -> TaggedImages:
        path = Path(self.predict)
        if self.predict not in (*ROLES, *self.splits.values()) and path.exists():
            images = list_images(path)
            return usable(images, self.on_bad_image, what=self.predict, threads=self.num_workers)
        try:
            return self._dataset(self.predict, "images")
        except ConfigurationError as error:
            raise ConfigurationError(f"data.predict='{self.predict}' is no path; {error}") from error

    def _evaluation_loader(self, images: TaggedImages) -> EvaluationLoader:
        collate = EvaluationCollator(self.num_classes - 1)
        loader = self._loader(images, batch_size=1, sampler=own_rows(len(images)), collate_fn=collate)
        return EvaluationLoader(loader, collate([]))

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            worker_init_fn=seed_worker,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _dataset(self, split: str, content: str) -> TaggedImages:
        """Return images with ``tags``, with ``truth``, or only ``images``; built and checked once."""
        if (split, content) not in self._datasets:
            self._datasets[split, content] = self._build_dataset(split, content)
        return self._datasets[split, content]

    def _build_dataset(self, split: str, content: str) -> TaggedImages:
        index = self.read_index(split, labelled=content == "tags")
        if content == "tags":
            index = tagged_only(index, self.on_bad_image, what=f"split '{split}'")
        masks = self.mask_source(split) if content == "truth" else None
        images = TaggedImages(index, self.image_source(split), masks)
        return usable(images, self.on_bad_image, what=f"split '{split}'", threads=self.num_workers)

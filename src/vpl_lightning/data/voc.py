"""PASCAL VOC 2012 in the devkit's layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vpl_lightning.archives.annotation import read_annotation
from vpl_lightning.archives.lists import read_ids
from vpl_lightning.archives.voc import AUGMENTED, LISTS, OWN, voc_root
from vpl_lightning.clip import ClassSet
from vpl_lightning.data.base import SegmentationDataModule
from vpl_lightning.data.checks import OnBadImage
from vpl_lightning.data.images import ImageFolder, MaskFolder
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.data.tags import read_label_file
from vpl_lightning.data.transforms import Augmentation
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.labels import VOID

LABEL_SOURCES = ("xml", "xml_no_difficult", "mask")


class VOCDataModule(SegmentationDataModule):
    """PASCAL VOC 2012 with image-level labels.

    Args:
        root: ``VOC2012``, ``VOCdevkit``, or the folder above.
        prepared: Where ``vpl prepare voc --output`` has put masks and lists; ``root`` by default.
        labels: Image-level labels: ``xml`` (all objects, as CLIP-ES), ``xml_no_difficult``, ``mask`` (the
            classes of the true mask), or a file (:func:`vpl_lightning.data.tags.read_label_file`).
        train_split: A list in ``ImageSets/Segmentation`` to train on; ``train`` is the official 1,464 images.
        val_split: The list that ``validate`` scores.
        test_split: The list that ``test`` scores; the official test set has no public masks.
        predict: A list, such as ``test`` for the server, an image file, or a folder of images.
        masks: Folder of true masks, below ``root`` or anywhere; by default ``SegmentationClassAug`` or,
            failing that, ``SegmentationClass``.
        batch_size: Training views a process.
        num_workers: Worker processes of a loader.
        crop_size: Side of the training views in pixels (WeCLIP: 320).
        on_bad_image: See :class:`SegmentationDataModule`.
        augmentation: What training views vary.
        train_masks: None, a folder of masks for phase 2, or ``truth``.
        classes: Class set; its names must be those in the XML files.
        seed: Orders and views of training.

    Raises:
        ConfigurationError: If ``root`` is no VOC; says where it looked.
    """

    def __init__(
        self,
        root: str,
        *,
        prepared: str | None = None,
        labels: str = "xml",
        train_split: str = "train_aug",
        val_split: str = "val",
        test_split: str = "val",
        predict: str = "val",
        masks: str | None = None,
        batch_size: int = 4,
        num_workers: int = 4,
        crop_size: int = 320,
        on_bad_image: OnBadImage = "raise",
        augmentation: Augmentation | None = None,
        train_masks: str | None = None,
        classes: ClassSet | str = "voc",
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes=classes,
            splits={"train": train_split, "val": val_split, "test": test_split},
            predict=predict,
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            on_bad_image=on_bad_image,
            augmentation=augmentation,
            seed=seed,
        )
        self.root = voc_root(root)
        self.prepared = Path(prepared) if prepared else self.root
        self.labels = labels
        self.masks = masks
        if labels not in LABEL_SOURCES and not Path(labels).is_file():
            raise ConfigurationError(
                f"data.labels='{labels}' is neither one of {', '.join(LABEL_SOURCES)} nor a file that exists"
            )
        self.choose_training_masks(train_masks)

    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        """Read a list of ids and the labels of its images."""
        ids = read_ids(self.list_path(split))
        labels = self._read_labels(split, ids, labelled=labelled)
        return TaggedIndex.of(Entry(name, f"{name}.jpg", labels.get(name, [])) for name in ids)

    def image_source(self, split: str) -> ImageFolder:
        """Return ``JPEGImages``; masks are drawn on the stored pixels, so EXIF orientation is ignored."""
        del split
        return ImageFolder(self.root / "JPEGImages")

    def mask_source(self, split: str) -> MaskFolder | None:
        """Return the first folder of masks that knows the split's first image."""
        first = read_ids(self.list_path(split))[0]
        found = [folder for folder in self._mask_folders() if folder.is_dir()]
        holding = [folder for folder in found if (folder / f"{first}.png").is_file()]
        if not holding and split == "test":
            return None
        if not found:
            raise DataError(
                f"{self.root} has no masks; looked for {', '.join(map(str, self._mask_folders()))}; run 'vpl "
                "prepare voc', or set data.masks"
            )
        return MaskFolder(
            (holding or found)[0], self.num_classes, fix="run 'vpl prepare voc', or set data.masks"
        )

    def list_path(self, split: str) -> Path:
        """Return the file that lists a split.

        Raises:
            ConfigurationError: If there is none; names the lists that exist.
        """
        folders = [self.prepared / LISTS, self.root / LISTS]
        for folder in folders:
            if (folder / f"{split}.txt").is_file():
                return folder / f"{split}.txt"
        known = sorted({path.stem for folder in folders for path in folder.glob("*.txt")})
        derive = "; 'vpl prepare voc' derives it from SBD" if split == "train_aug" else ""
        raise ConfigurationError(
            f"split '{split}' has no list {folders[-1] / split}.txt; there are: "
            f"{', '.join(known) or 'none'}{derive}"
        )

    def _mask_folders(self) -> list[Path]:
        if self.masks:
            return [self.root / self.masks]
        return list(
            dict.fromkeys(base / name for name in (AUGMENTED, OWN) for base in (self.prepared, self.root))
        )

    def _read_labels(self, split: str, ids: list[str], *, labelled: bool) -> Mapping[str, list[int]]:
        if self.labels == "mask":
            return self._mask_labels(split, ids)
        if self.labels not in LABEL_SOURCES:
            return read_label_file(Path(self.labels), self.classes)
        folder = self.root / "Annotations"
        if not labelled:
            ids = [name for name in ids if (folder / f"{name}.xml").is_file()]
        return {name: self._xml_labels(folder / f"{name}.xml") for name in ids}

    def _xml_labels(self, path: Path) -> list[int]:
        names = read_annotation(path).names(difficult=self.labels == "xml")
        unknown = [name for name in names if name not in self.classes.foreground]
        if unknown:
            raise DataError(
                f"{path}: class '{unknown[0]}' is not in the class set '{self.classes.name}'; set "
                "data.classes to the classes of this data set"
            )
        return [self.classes.foreground.index(name) for name in names]

    def _mask_labels(self, split: str, ids: Iterable[str]) -> dict[str, list[int]]:
        masks = self.mask_source(split)
        if masks is None:
            return {}

        def present(name: str) -> tuple[str, list[int]]:
            values = np.unique(masks.mask(Entry(name, f"{name}.jpg", [])))
            return name, [int(value) - 1 for value in values if value not in (0, VOID)]

        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            return dict(pool.map(present, ids))

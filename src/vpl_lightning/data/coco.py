"""MS COCO, read from the per-image files that ``vpl prepare coco`` makes."""

from __future__ import annotations

from pathlib import Path

from vpl_lightning.archives.coco import INDEX_FOLDER, MASK_LAYOUTS, coco_images, places_of
from vpl_lightning.clip import ClassSet
from vpl_lightning.data.base import SegmentationDataModule
from vpl_lightning.data.checks import OnBadImage
from vpl_lightning.data.images import ImageFolder, MaskFolder
from vpl_lightning.data.index import TaggedIndex
from vpl_lightning.data.transforms import Augmentation
from vpl_lightning.errors import ConfigurationError, DataError


class COCODataModule(SegmentationDataModule):
    """COCO with image-level labels, prepared by ``vpl prepare coco``.

    Ids, files and tags are memory-mapped and masks are files of one image each, so that memory does not grow
    with the number of images.

    Args:
        root: Folder of the unpacked archives; several layouts are known, see
            :data:`vpl_lightning.archives.coco.IMAGE_LAYOUTS`.
        prepared: Where ``vpl prepare coco --output`` has put its files; ``root`` by default.
        train_split: ``train2014``, or another that was prepared.
        val_split: The split that ``validate`` scores.
        test_split: The split that ``test`` scores.
        predict: A split or its role, an image file, or a folder of images.
        masks: Folder of true masks, with ``{split}`` where folders differ; by default those of ``prepare``.
        batch_size: Training views a process.
        num_workers: Worker processes of a loader.
        crop_size: Side of the training views in pixels (WeCLIP: 320).
        on_bad_image: See :class:`SegmentationDataModule`.
        augmentation: What training views vary.
        train_masks: None, a folder of masks for phase 2, or ``truth``.
        classes: Class set, in the order of the masks' values.
        seed: Orders and views of training.

    Raises:
        ConfigurationError: If ``root`` does not exist.
    """

    def __init__(
        self,
        root: str,
        *,
        prepared: str | None = None,
        train_split: str = "train2014",
        val_split: str = "val2014",
        test_split: str = "val2014",
        predict: str = "val",
        masks: str | None = None,
        batch_size: int = 4,
        num_workers: int = 4,
        crop_size: int = 320,
        on_bad_image: OnBadImage = "raise",
        augmentation: Augmentation | None = None,
        train_masks: str | None = None,
        classes: ClassSet | str = "coco",
        seed: int = 0,
    ) -> None:
        splits = {"train": train_split, "val": val_split, "test": test_split}
        super().__init__(
            classes=classes,
            splits=splits,
            predict=splits.get(predict, predict),
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            on_bad_image=on_bad_image,
            augmentation=augmentation,
            seed=seed,
        )
        self.root = Path(root)
        if not self.root.is_dir():
            raise ConfigurationError(
                f"data.root='{root}' is no folder; give the one with COCO's images and annotations"
            )
        self.prepared = Path(prepared) if prepared else self.root
        self.masks = masks
        self.choose_training_masks(train_masks)

    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        """Open the index that ``vpl prepare coco`` wrote."""
        del labelled
        folder = self.prepared / INDEX_FOLDER
        if not (folder / f"{split}.ids.npy").is_file():
            known = sorted(path.name.removesuffix(".ids.npy") for path in folder.glob("*.ids.npy"))
            raise ConfigurationError(
                f"split '{split}' is not prepared: {folder} has {', '.join(known) or 'nothing'}; run 'vpl "
                f"prepare coco {self.root}', or set data.prepared to its output"
            )
        return TaggedIndex.load(folder / split)

    def image_source(self, split: str) -> ImageFolder:
        """Find the images of a split; their EXIF orientation is ignored, as the annotations do."""
        return ImageFolder(coco_images(self.root, split, self.read_index(split, labelled=False).files[0]))

    def mask_source(self, split: str) -> MaskFolder:
        """Find the true masks of a split, under the whole id or without ``COCO_<split>_``."""
        first = self.read_index(split, labelled=False).ids[0]
        if self.masks:
            folders = [self.root / self.masks.format(split=split)]
        else:
            places = places_of(split, MASK_LAYOUTS)
            folders = list(
                dict.fromkeys(base / place for place in places for base in (self.prepared, self.root))
            )
        fix = "run 'vpl prepare coco', or set data.masks"
        for folder in folders:
            for prefix in ("", f"COCO_{split}_"):
                masks = MaskFolder(folder, self.num_classes, fix=fix, prefix=prefix)
                if masks.path(first).is_file():
                    return masks
        raise DataError(
            f"no mask of '{first}', the first image of '{split}', in {', '.join(map(str, folders))}; {fix}"
        )

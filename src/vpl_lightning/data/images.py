"""Decoding of images and masks, and the data set of images with tags."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from vpl_lightning.archives.verify import DECODING_ERRORS, WIDE_MODES
from vpl_lightning.artifacts import read_mask
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.errors import DataError
from vpl_lightning.structures import ImageArray

MaskArray = UInt8[np.ndarray, "H W"]
"""A label map: 0 background, class id + 1 foreground, 255 void."""


class Sample(TypedDict):
    """One image with what is known of it."""

    id: str
    image: ImageArray
    labels: list[int]
    """0-based foreground ids."""
    mask: MaskArray | None
    """The truth or pseudo-mask, of the image's size; None where no mask was asked for."""


class ImageSource(ABC):
    """Where images come from."""

    @abstractmethod
    def image(self, entry: Entry) -> ImageArray:
        """Decode one image.

        Raises:
            DataError: If it is missing or damaged; names it.
        """


class MaskSource(ABC):
    """Where masks come from."""

    @abstractmethod
    def mask(self, entry: Entry) -> MaskArray:
        """Decode one mask.

        Raises:
            DataError: If it is missing or damaged; names it.
        """


@dataclass(frozen=True)
class ImageFolder(ImageSource):
    """Image files below a folder.

    Attributes:
        root: The folder.
        upright: Turn images as their EXIF orientation says. Off for VOC and COCO, whose masks are drawn on
            the stored pixels; on for people's own photographs.
    """

    root: Path
    upright: bool = False

    def image(self, entry: Entry) -> ImageArray:
        """Decode one image to RGB."""
        return read_image(self.root / entry.file, upright=self.upright)


@dataclass(frozen=True)
class MaskFolder(MaskSource):
    """Masks ``<id>.png`` in a folder.

    Attributes:
        root: The folder.
        num_classes: Classes with the background; other values than 255 are refused.
        fix: What to do when a mask is missing, for the error message.
        prefix: Start of an id that file names leave out.
    """

    root: Path
    num_classes: int
    fix: str = "check the folder of masks"
    prefix: str = ""

    def path(self, image_id: str) -> Path:
        """Return where the mask of an image should be."""
        return self.root / f"{image_id.removeprefix(self.prefix)}.png"

    def mask(self, entry: Entry) -> MaskArray:
        """Decode one mask as indices."""
        path = self.path(entry.id)
        if not path.is_file():
            raise DataError(f"{path} is missing: no mask for image '{entry.id}'; {self.fix}")
        return read_mask(path, num_classes=self.num_classes)


class TaggedImages(Dataset[Sample]):
    """Images with their tags, and with masks if a source of masks is given.

    Args:
        index: Ids, files and tags.
        images: Decodes images.
        masks: Decodes masks, or None.
    """

    def __init__(self, index: TaggedIndex, images: ImageSource, masks: MaskSource | None = None) -> None:
        self.index = index
        self.images = images
        self.masks = masks

    @property
    def ids(self) -> Sequence[str]:
        """Image ids, in order."""
        return self.index.ids

    def labels(self, row: int) -> list[int]:
        """Return the tags of one image without decoding it."""
        return self.index.labels(row)

    def without(self, ids: set[str] | frozenset[str]) -> TaggedImages:
        """Return the same images without some."""
        return TaggedImages(self.index.without(ids), self.images, self.masks)

    def missing_files(self) -> list[Path]:
        """Return the image and mask files that are not there, without opening any."""
        return [path for entry in self.index for path in self._paths(entry) if not path.is_file()]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.index)

    def __getitem__(self, row: int) -> Sample:
        """Decode one image, and its mask.

        Raises:
            DataError: If a file is missing or damaged, or the sizes differ; names it.
        """
        entry = self.index[row]
        image = self.images.image(entry)
        mask = None if self.masks is None else self.masks.mask(entry)
        if mask is not None and mask.shape != image.shape[:2]:
            raise DataError(
                f"image '{entry.id}' has {image.shape[0]} x {image.shape[1]} pixels (H x W), its mask "
                f"{mask.shape[0]} x {mask.shape[1]}; make the mask again from this image"
            )
        return Sample(id=entry.id, image=image, labels=entry.labels, mask=mask)

    def _paths(self, entry: Entry) -> Iterator[Path]:
        if isinstance(self.images, ImageFolder):
            yield self.images.root / entry.file
        if isinstance(self.masks, MaskFolder):
            yield self.masks.path(entry.id)


def read_image(path: Path, *, upright: bool = False) -> ImageArray:
    """Decode a file to 8-bit RGB: grey is repeated, CMYK and palettes are converted, transparency is dropped.

    Args:
        path: The file.
        upright: Turn the image as its EXIF orientation says.

    Raises:
        DataError: If the file is missing, empty, truncated or no image; names it.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; check the root and the list of ids")
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if upright else image
            return np.array(_rgb(turned))
    except DECODING_ERRORS as error:
        raise DataError(
            f"{path} cannot be decoded ({error}); restore it, or set on_bad_image to skip to leave such "
            "images out"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        raise ValueError("32 bits a pixel; save it with 8 or 16")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")

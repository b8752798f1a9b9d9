"""Opens every file of a data set once and says what is wrong with it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vpl_lightning.archives.annotation import read_annotation
from vpl_lightning.archives.parallel import process_files
from vpl_lightning.artifacts import read_mask
from vpl_lightning.errors import DataError
from vpl_lightning.functional.labels import VOID

FORMATS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP", "DIB"),
    ".webp": ("WEBP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}
"""Image formats that a suffix promises. Phones write MPO, a JPEG with a second picture, as ``.jpg``."""


DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged files."""
WIDE_MODES = ("I", "F")
"""Modes of Pillow with 32 bits a pixel, which have no range that 8 bits could stand for."""


class Fault(NamedTuple):
    """One thing that is wrong with one file."""

    kind: str
    id: str
    detail: str


@dataclass(frozen=True)
class ImageCheck:
    """What belongs to an image.

    Attributes:
        id: Its id.
        image: Its file.
        annotation: VOC's XML file with its tags, or None.
        tags: Its tags as class names where there is no XML; None if it needs none.
        size: ``(H, W)`` that a catalogue promises, or None.
        mask: Its true mask, or None if it needs none.
        upright: Whether the mask fits the image turned as its EXIF orientation says.
    """

    id: str
    image: Path
    annotation: Path | None = None
    tags: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    mask: Path | None = None
    upright: bool = False


@dataclass(frozen=True)
class Rules:
    """What tags and masks may hold.

    Attributes:
        names: Class names that tags may use.
        num_classes: Values of masks lie below, or are void.
        deep: Decode every file; otherwise only look whether it is there.
    """

    names: frozenset[str]
    num_classes: int
    deep: bool


def verify(checks: Iterable[ImageCheck], rules: Rules, *, total: int, workers: int | None) -> list[Fault]:
    """Check images in parallel, with a progress bar.

    Args:
        checks: What belongs to each image.
        rules: What tags and masks may hold.
        total: How many images there are.
        workers: Helper processes; None takes one a core.

    Returns:
        Faults by kind and id. A file that cannot be read gives one fault, not several that follow from it.
    """
    title = "opening every file" if rules.deep else "looking for files"
    check = partial(check_image, rules=rules)
    results = process_files(check, checks, total=total, title=title, workers=workers)
    return sorted(fault for faults in results for fault in faults)


def check_image(check: ImageCheck, *, rules: Rules) -> list[Fault]:
    """Return what is wrong with an image and what belongs to it."""
    faults = [*_tag_faults(check, rules)]
    size, fault = _image_size(check, rules)
    faults.extend(fault)
    promised = check.size or _annotated_size(check)
    if size and promised and size != promised:
        detail = f"{check.image} is {_text(size)}, its annotation says {_text(promised)}"
        faults.append(Fault("image of wrong size", check.id, detail))
    elif check.mask:
        faults.extend(_mask_faults(check.id, check.mask, size, rules))
    return faults


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels (H x W)"


def _annotated_size(check: ImageCheck) -> tuple[int, int] | None:
    try:
        return read_annotation(check.annotation).size if check.annotation else None
    except DataError:
        return None


def _tag_faults(check: ImageCheck, rules: Rules) -> Iterator[Fault]:
    tags = check.tags
    if check.annotation:
        if not check.annotation.is_file():
            yield Fault("annotation missing", check.id, f"{check.annotation}")
            return
        if not rules.deep:
            return
        try:
            tags = tuple(read_annotation(check.annotation).names())
        except DataError as error:
            yield Fault("annotation unreadable", check.id, str(error))
            return
    if tags is None:
        return
    source = check.annotation or check.image
    if not tags:
        yield Fault("image without tags", check.id, f"{source} names no class")
    unknown = [tag for tag in tags if tag not in rules.names]
    if unknown:
        yield Fault("unknown class", check.id, f"{source}: {', '.join(unknown)}")


def _image_size(check: ImageCheck, rules: Rules) -> tuple[tuple[int, int] | None, list[Fault]]:
    """Return the image's size if it could be decoded, and else what is wrong."""
    path = check.image
    if not path.is_file():
        return None, [Fault("image missing", check.id, f"{path}")]
    if not rules.deep:
        return None, []
    if not path.stat().st_size:
        return None, [Fault("image file empty", check.id, f"{path} has no bytes")]
    try:
        with Image.open(path) as image:
            kind = image.format or ""
            if kind not in FORMATS.get(path.suffix.lower(), (kind,)):
                detail = f"{path} holds {kind}; rename or convert it"
                return None, [Fault("image of wrong format", check.id, detail)]
            if image.mode in WIDE_MODES:
                detail = f"{path} has 32 bits a pixel; save it with 8 or 16"
                return None, [Fault("image of wrong format", check.id, detail)]
            image.load()
            turned = ImageOps.exif_transpose(image) if check.upright else image
            return (turned.height, turned.width), []
    except UnidentifiedImageError:
        return None, [Fault("not an image", check.id, f"{path} is no image that can be read")]
    except DECODING_ERRORS as error:
        return None, [Fault("image damaged", check.id, f"{path}: {error}")]


def _mask_faults(image_id: str, path: Path, size: tuple[int, int] | None, rules: Rules) -> Iterator[Fault]:
    if not path.is_file():
        yield Fault("mask missing", image_id, f"{path}")
        return
    if not rules.deep:
        return
    try:
        mask = read_mask(path)
    except DataError as error:
        yield Fault("mask unreadable", image_id, str(error))
        return
    if size and mask.shape != size:
        yield Fault("mask of wrong size", image_id, f"{path} is {_text(mask.shape)}, its image {_text(size)}")
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)[rules.num_classes : VOID])
    if len(values):
        listed = ", ".join(str(value + rules.num_classes) for value in values)
        yield Fault("mask with unknown values", image_id, f"{path}: {listed}")

"""Lists of image ids: those of a data set's folder, and the official ones to compare them with."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from vpl_lightning.errors import DataError

SHIPPED = Path(__file__).parent.parent / "data" / "lists"
OFFICIAL_VOC_COUNTS = {"train": 1464, "val": 1449, "train_aug": 10582, "test": 1456}
"""Images of VOC 2012 segmentation; ``train_aug`` is SBD's train and val with VOC's train, without VOC's "
"val."""
OFFICIAL_COCO_COUNTS = {"train2014": (82_783, 82_081), "val2014": (40_504, 40_137)}
"""Images of COCO 2014, and those of them with at least one labelled object."""


def read_ids(path: Path) -> list[str]:
    """Read a list of ids, one a line; further columns and empty lines are ignored.

    Raises:
        DataError: If the file cannot be read, or holds no id or one twice; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of ids: {error}") from error
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path} lists no id")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path} lists '{first_repeated(ids)}' twice; keep one")
    return ids


def official_voc_ids(split: str) -> list[str]:
    """Return the ids of ``train``, ``val``, ``train_aug`` or ``test`` of VOC 2012, in the official order."""
    content = gzip.decompress((SHIPPED / f"voc2012_{split}.txt.gz").read_bytes())
    return content.decode().split()


def first_repeated(values: Sequence[str]) -> str | None:
    """Return the first value that comes a second time, or None."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None

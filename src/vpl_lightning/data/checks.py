"""Decides, alike on all ranks, which images of a split cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from torch import distributed

from vpl_lightning.data.images import TaggedImages
from vpl_lightning.data.index import TaggedIndex
from vpl_lightning.errors import ConfigurationError, DataError

OnBadImage = Literal["raise", "skip", "list"]
"""What to do about images that cannot be used.

``raise``: stop if a file is not there, and at the first that is damaged, when it is read. ``list``: open
all before starting, and stop with the names of all bad ones. ``skip``: open all before starting, print the
bad ones and go on without them.
"""
ROWS_AT_A_TIME = 1024
"""Images handed to the threads at once, so that memory does not grow with their number."""
NAMES_SHOWN = 20
"""Bad images that an error message spells out."""


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def usable(images: TaggedImages, policy: OnBadImage, *, what: str, threads: int = 1) -> TaggedImages:
    """Apply a policy to images that cannot be decoded and to masks that do not fit.

    Every file is opened once, by one rank, and all ranks receive all findings.

    Args:
        images: The images of a split, with masks where masks are read too.
        policy: What to do, see :data:`OnBadImage`.
        what: Name of the split, for messages.
        threads: Files opened at a time; decoding releases the interpreter lock.

    Raises:
        DataError: With policy ``raise``, naming the files that are not there; with ``list``, naming every
            bad image; with ``skip``, if nothing is left.
    """
    if policy == "raise":
        missing = images.missing_files()
        if missing:
            raise DataError(
                f"{what}: {len(missing)} files are missing: {named(list(map(str, missing)))}; restore them, "
                "take the images off the list, or set on_bad_image to skip"
            )
        return images
    bad = find_bad(images, threads=threads)
    if not bad:
        return images
    if policy == "list":
        raise DataError(f"{what}: {len(bad)} of {len(images)} images cannot be used:\n{_lines(bad)}")
    if len(bad) == len(images):
        raise DataError(f"{what}: none of the {len(images)} images can be used:\n{_lines(bad)}")
    announce(f"{what}: leaving out {len(bad)} of {len(images)} images:\n{_lines(bad, shown=len(bad))}")
    return images.without(set(bad))


def find_bad(images: TaggedImages, *, threads: int = 1) -> dict[str, str]:
    """Open every image, and its mask, once; return what is wrong by id, the same on all ranks."""

    def fault(row: int) -> tuple[str, str] | None:
        try:
            images[row]
        except DataError as error:
            return images.ids[row], str(error)
        return None

    rank, world_size = ranks()
    rows = range(rank, len(images), world_size)
    found = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            found += [item for item in pool.map(fault, rows[start : start + ROWS_AT_A_TIME]) if item]
    if world_size > 1:
        shares: list[list[tuple[str, str]]] = [[] for _ in range(world_size)]
        distributed.all_gather_object(shares, found)
        found = [item for share in shares for item in share]
    return dict(sorted(found))


def tagged_only(index: TaggedIndex, policy: OnBadImage, *, what: str) -> TaggedIndex:
    """Return the images with a tag, which phase 1 needs.

    Args:
        index: All images.
        policy: ``skip`` leaves images without a tag out and prints them.
        what: Name of the split, for messages.

    Raises:
        ConfigurationError: With the other policies, or if no image has a tag; names them.
    """
    unlabelled = index.unlabelled()
    if not unlabelled:
        return index
    found = f"{what}: {len(unlabelled)} of {len(index)} images have no tag: {named(unlabelled)}"
    if policy != "skip" or len(unlabelled) == len(index):
        raise ConfigurationError(f"{found}; tag them, take them off the list, or set on_bad_image to skip")
    announce(f"{found}; leaving them out")
    return index.without(set(unlabelled))


def announce(message: str) -> None:
    """Print a line, on the first rank alone."""
    if ranks()[0] == 0:
        print(f"vpl: {message}", flush=True)


def named(ids: list[str]) -> str:
    """Spell out the first ids of a list."""
    rest = len(ids) - NAMES_SHOWN
    return ", ".join(ids[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _lines(bad: Mapping[str, str], *, shown: int = NAMES_SHOWN) -> str:
    lines = [f"  {name}: {message}" for name, message in list(bad.items())[:shown]]
    if len(bad) > shown:
        lines.append(f"  and {len(bad) - shown} more: {named(list(bad)[shown:])}")
    return "\n".join(lines)

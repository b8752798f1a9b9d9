"""What a split holds: image ids, their files and their tags, in arrays that may stay on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from vpl_lightning.artifacts import atomic_path
from vpl_lightning.errors import DataError

ARRAYS = ("ids", "files", "offsets", "tags")


class Entry(NamedTuple):
    """One image of a split."""

    id: str
    file: str
    """Path of the image below the folder of images, with ``/``."""
    labels: list[int]
    """0-based foreground ids, in the order in which the source gives them."""


class Texts(Sequence[str]):
    """Strings in one array of fixed-width UTF-8, which may be memory-mapped."""

    def __init__(self, array: Shaped[np.ndarray, " rows"]) -> None:
        self.array = array

    @classmethod
    def of(cls, values: Iterable[str]) -> Texts:
        """Pack strings."""
        encoded = [value.encode() for value in values]
        return cls(np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}"))

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> list[str]: ...

    def __getitem__(self, position: int | slice) -> str | list[str]:
        """Return one string, or a list of those of a slice."""
        if isinstance(position, slice):
            return [value.decode() for value in self.array[position]]
        return bytes(self.array[position]).decode()

    def __len__(self) -> int:
        """Count the strings."""
        return len(self.array)


class TaggedIndex:
    """Ids, files and tags of a split, row by row.

    Nothing here grows with the number of images when the arrays are memory-mapped (:meth:`load`); such an
    index is sent to worker processes as its path.

    Args:
        ids: Unique ids; the name of every file made for an image.
        files: Paths of the images below their folder.
        offsets: Row ``i`` has the tags ``tags[offsets[i]:offsets[i + 1]]``.
        tags: 0-based foreground ids.
        stored: Path prefix that :meth:`load` read the arrays from.
    """

    def __init__(
        self,
        ids: Texts,
        files: Texts,
        offsets: npt.NDArray[np.int64],
        tags: npt.NDArray[np.uint16],
        *,
        stored: Path | None = None,
    ) -> None:
        self.ids = ids
        self.files = files
        self.offsets = offsets
        self.tags = tags
        self.stored = stored

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> TaggedIndex:
        """Pack entries.

        Raises:
            DataError: If an id comes twice; names it.
        """
        rows = list(entries)
        seen: dict[str, str] = {}
        for row in rows:
            if row.id in seen:
                raise DataError(
                    f"image id '{row.id}' comes twice, as {seen[row.id]} and {row.file}; rename or remove "
                    "one, since masks are named by id"
                )
            seen[row.id] = row.file
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row.labels) for row in rows], out=offsets[1:])
        tags = np.array([tag for row in rows for tag in row.labels], np.uint16)
        return cls(Texts.of(row.id for row in rows), Texts.of(row.file for row in rows), offsets, tags)

    @classmethod
    def load(cls, prefix: Path) -> TaggedIndex:
        """Open the arrays that :meth:`save` wrote, memory-mapped.

        Raises:
            DataError: If one is missing or unreadable; names it.
        """
        arrays = {}
        for name in ARRAYS:
            path = _array_path(prefix, name)
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, EOFError, ValueError) as error:
                raise DataError(
                    f"{path} cannot be read as an index: {error}; run 'vpl prepare' again"
                ) from error
        return cls(
            Texts(arrays["ids"]), Texts(arrays["files"]), arrays["offsets"], arrays["tags"], stored=prefix
        )

    def save(self, prefix: Path) -> None:
        """Write the arrays as ``<prefix>.<name>.npy``, each whole or not at all."""
        arrays = {
            "ids": self.ids.array,
            "files": self.files.array,
            "offsets": self.offsets,
            "tags": self.tags,
        }
        for name in ARRAYS:
            with atomic_path(_array_path(prefix, name)) as partial, partial.open("wb") as stream:
                np.save(stream, np.asarray(arrays[name]), allow_pickle=False)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.ids)

    def __getitem__(self, row: int) -> Entry:
        """Return one image."""
        return Entry(self.ids[row], self.files[row], self.labels(row))

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the images."""
        return (self[row] for row in range(len(self)))

    def labels(self, row: int) -> list[int]:
        """Return the tags of one image."""
        return [int(tag) for tag in self.tags[self.offsets[row] : self.offsets[row + 1]]]

    def unlabelled(self) -> list[str]:
        """Return the ids of the images without a tag."""
        return [self.ids[int(row)] for row in np.flatnonzero(np.diff(self.offsets) == 0)]

    def without(self, ids: Collection[str]) -> TaggedIndex:
        """Return the index without some images, or itself if it holds none of them."""
        if not ids:
            return self
        left_out = np.array([name.encode() for name in ids])
        rows = np.flatnonzero(~np.isin(self.ids.array, left_out))
        if len(rows) == len(self):
            return self
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        kept = np.repeat(~np.isin(self.ids.array, left_out), np.diff(self.offsets))
        return TaggedIndex(
            Texts(self.ids.array[rows]), Texts(self.files.array[rows]), offsets, np.asarray(self.tags[kept])
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 over ids, files and tags, independent of where they are stored."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(repr(tuple(entry)).encode())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Travel to other processes as a path where there is one."""
        if self.stored is not None:
            return TaggedIndex.load, (self.stored,)
        return TaggedIndex, (self.ids, self.files, self.offsets, self.tags)


def _array_path(prefix: Path, name: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{name}.npy")

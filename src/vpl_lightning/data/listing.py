"""Finds image files, and reads lists of ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.errors import ConfigurationError, DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Suffixes, in small letters, of files that count as images."""


def list_images(path: Path) -> tuple[Path, TaggedIndex]:
    """List one image, or the images of a folder and the folders below it, sorted, hidden ones left out.

    Returns:
        The folder, and an index without tags. Ids are file names without suffix.

    Raises:
        ConfigurationError: If there is no image.
        DataError: If two files share an id; names both.
    """
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ConfigurationError(f"{path} is no image; suffixes that are: {', '.join(IMAGE_SUFFIXES)}")
        return path.parent, TaggedIndex.of([Entry(path.stem, path.name, [])])
    files = image_files(path)
    if not files:
        raise ConfigurationError(
            f"{path} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}, in sub-folders too"
        )
    return path, TaggedIndex.of(Entry(Path(name).stem, name, []) for name in files)


def image_files(folder: Path) -> list[str]:
    """Return the paths of the images below a folder, relative to it, sorted."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


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


def first_repeated(values: Sequence[str]) -> str | None:
    """Return the first value that comes a second time, or None."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None

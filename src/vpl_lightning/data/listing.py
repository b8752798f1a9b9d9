"""Finds image files."""

from __future__ import annotations

from pathlib import Path

from vpl_lightning.data.images import ImageFolder, TaggedImages
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.errors import ConfigurationError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Suffixes, in small letters, of files that count as images."""


def list_images(path: Path) -> TaggedImages:
    """List one image, or the images of a folder and the folders below it, sorted, hidden ones left out.

    Returns:
        The images, upright and without tags. Ids are file names without suffix.

    Raises:
        ConfigurationError: If there is no image.
        DataError: If two files share an id; names both.
    """
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ConfigurationError(f"{path} is no image; suffixes that are: {', '.join(IMAGE_SUFFIXES)}")
        return _untagged(path.parent, [path.name])
    files = image_files(path)
    if not files:
        raise ConfigurationError(
            f"{path} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}, in sub-folders too"
        )
    return _untagged(path, files)


def image_files(folder: Path) -> list[str]:
    """Return the paths of the images below a folder, relative to it, sorted."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _untagged(folder: Path, files: list[str]) -> TaggedImages:
    index = TaggedIndex.of(Entry(Path(name).stem, name, []) for name in files)
    return TaggedImages(index, ImageFolder(folder, upright=True))

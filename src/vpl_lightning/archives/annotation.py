"""VOC's XML annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from vpl_lightning.errors import DataError


@dataclass(frozen=True)
class VOCAnnotation:
    """What an XML file says of an image.

    Attributes:
        size: ``(H, W)`` in pixels.
        objects: Class name and ``difficult`` flag of every object, in order.
    """

    size: tuple[int, int]
    objects: tuple[tuple[str, bool], ...]

    def names(self, *, difficult: bool = True) -> list[str]:
        """Return the class names, each once, in order of first appearance (CLIP-ES's order)."""
        return list(dict.fromkeys(name for name, hard in self.objects if difficult or not hard))


def read_annotation(path: Path) -> VOCAnnotation:
    """Read size and objects from an XML file.

    Raises:
        DataError: If it is missing or not VOC's XML; names it.
    """
    try:
        tree = ElementTree.parse(path).getroot()  # noqa: S314  (expat expands no external entities)
        size = int(tree.findtext("size/height", "")), int(tree.findtext("size/width", ""))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: no image-level labels; restore it, or set data.labels"
        ) from error
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} is not an annotation of VOC: {error}; restore it") from error
    objects = tuple(
        (item.findtext("name", "").strip(), item.findtext("difficult", "0").strip() == "1")
        for item in tree.findall("object")
    )
    return VOCAnnotation(size, objects)

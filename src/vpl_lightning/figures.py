"""Pictures for people: heat maps over photographs, coloured masks, and sheets of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vpl_lightning.artifacts import voc_palette
from vpl_lightning.structures import ImageArray

HEAT = np.array([[20, 20, 90], [30, 120, 200], [70, 200, 160], [250, 220, 60], [220, 40, 30]], np.float32)
"""Colours of a heat map at 0, 1/4, 1/2, 3/4 and 1."""
OPACITY = 0.6
"""Share of the heat map or mask in an overlay."""
MARGIN = 4
"""Pixels between the cells of a sheet."""
HEADER = 16
"""Height in pixels of the line of titles."""


def heat_overlay(image: ImageArray, heat: npt.NDArray[np.float32]) -> ImageArray:
    """Lay a map in [0, 1] of the image's size over the image."""
    position = np.clip(heat, 0, 1) * (len(HEAT) - 1)
    lower = np.minimum(position.astype(np.int64), len(HEAT) - 2)
    share = (position - lower)[..., None]
    colour = HEAT[lower] * (1 - share) + HEAT[lower + 1] * share
    return _blend(image, colour, np.ones(image.shape[:2], bool))


def mask_overlay(image: ImageArray, mask: npt.NDArray[np.integer]) -> ImageArray:
    """Lay the palette colours of a label map over the image; background stays as it is, void is white."""
    palette = voc_palette().astype(np.float32)
    palette[255] = 255
    return _blend(image, palette[mask], mask != 0)


def sheet(rows: Sequence[Sequence[ImageArray]], titles: Sequence[str], *, cell: int = 160) -> Image.Image:
    """Arrange pictures in a grid under a line of titles.

    Args:
        rows: Pictures of any size; each is fitted into a square cell.
        titles: One a column.
        cell: Side of a cell in pixels.
    """
    step = cell + MARGIN
    canvas = Image.new("RGB", (len(titles) * step + MARGIN, len(rows) * step + MARGIN + HEADER), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((column * step + MARGIN, 2), title, fill="black")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture)
            image = image.resize(_fit(image.size, cell), Image.Resampling.BICUBIC)
            canvas.paste(image, (column * step + MARGIN, row * step + MARGIN + HEADER))
    return canvas


def _fit(size: tuple[int, int], cell: int) -> tuple[int, int]:
    scale = cell / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _blend(image: ImageArray, colour: npt.NDArray[np.float32], where: npt.NDArray[np.bool_]) -> ImageArray:
    share = OPACITY * where[..., None].astype(np.float32)
    return np.asarray(np.rint(image * (1 - share) + colour * share), np.uint8)

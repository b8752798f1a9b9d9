"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont

CELL = 18
"""Side of a cell in pixels."""
MARGIN = 6
"""Pixels around the matrix and its names."""
DARK = np.array([20, 40, 110], np.float64)
"""Colour of a share of 1; 0 is white."""


def draw_confusion(matrix: Int64[np.ndarray, "C C"], names: Sequence[str]) -> Image.Image:
    """Draw the share of every true class (rows) that goes to every predicted class (columns).

    Shares are shown by their square root, so that small confusions are visible; grey rows have no true pixel.

    Args:
        matrix: Rows are the truth.
        names: One a class.
    """
    truth = matrix.sum(1, keepdims=True)
    shade = np.sqrt(matrix / np.maximum(truth, 1))[..., None]
    colours = 255 + shade * (DARK - 255)
    colours[truth[:, 0] == 0] = 230
    grid = np.repeat(np.repeat(colours.round().astype(np.uint8), CELL, 0), CELL, 1)
    font = ImageFont.load_default()
    label = max(round(font.getlength(name)) for name in names) + 2 * MARGIN
    side = len(names) * CELL
    canvas = Image.new("RGB", (label + side + MARGIN, label + side + MARGIN), "white")
    canvas.paste(Image.fromarray(grid), (label, label))
    rows = _names(names, font, label)
    canvas.paste(rows, (0, label))
    canvas.paste(rows.transpose(Image.Transpose.ROTATE_270), (label, 0))
    return canvas


def _names(
    names: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Image.Image:
    strip = Image.new("RGB", (width, len(names) * CELL), "white")
    draw = ImageDraw.Draw(strip)
    for row, name in enumerate(names):
        draw.text((MARGIN, row * CELL + 3), name, fill="black", font=font)
    return strip

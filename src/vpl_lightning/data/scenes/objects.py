"""Draws one object: its parts in a random pose, with texture and light, and its exact coverage."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vpl_lightning.data.scenes.animals import bird, cat, dog, horse
from vpl_lightning.data.scenes.primitives import Part
from vpl_lightning.data.scenes.surfaces import texture
from vpl_lightning.data.scenes.things import boat, car, chair, plane, train, umbrella

SUPERSAMPLING = 2
"""Sub-pixels per side of a pixel when outlines are drawn."""

TURN_DEGREES = {"bird": 25.0, "plane": 30.0, "umbrella": 25.0}
"""Largest tilt of classes that tilt freely; others stand within ``UPRIGHT_DEGREES``."""

UPRIGHT_DEGREES = 10.0

BUILDERS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "train": train,
    "boat": boat,
    "car": car,
    "bird": bird,
    "plane": plane,
    "horse": horse,
    "cat": cat,
    "chair": chair,
    "umbrella": umbrella,
    "dog": dog,
}
"""Builder of every class by its name; the order is the order of the labels."""


class Drawing(NamedTuple):
    """An object on an empty canvas: colours (H, W, 3) in [0, 1] and coverage (H, W) in [0, 1]."""

    colour: npt.NDArray[np.float32]
    coverage: npt.NDArray[np.float32]


def draw_object(
    rng: np.random.Generator, name: str, *, size: int, centre: tuple[float, float], radius: float
) -> Drawing:
    """Draw one object of class ``name``.

    Args:
        rng: Source of every choice: make, colours, pose, mirror image, tilt, stretch, texture.
        name: A key of ``BUILDERS``.
        size: Side of the square canvas in pixels.
        centre: Position (x, y) of the object's middle in pixels.
        radius: Half of the object's longer side in pixels, before tilt.
    """
    parts = BUILDERS[name](rng)
    corners = np.concatenate([part.points for part in parts])
    low, high = corners.min(0), corners.max(0)
    limit = np.deg2rad(TURN_DEGREES.get(name, UPRIGHT_DEGREES))
    turn, mirror = rng.uniform(-limit, limit), 1.0 if rng.random() < 0.5 else -1.0
    scale = radius * 2.0 / float((high - low).max()) * np.array([mirror * rng.uniform(0.85, 1.15), 1.0])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    fine = size * SUPERSAMPLING
    colours, cover = Image.new("RGB", (fine, fine)), Image.new("L", (fine, fine))
    colour_pen, cover_pen = ImageDraw.Draw(colours), ImageDraw.Draw(cover)
    for part in parts:
        placed = ((part.points - (low + high) / 2.0) * scale @ rotation.T + np.array(centre)) * SUPERSAMPLING
        outline = [(float(x), float(y)) for x, y in placed]
        red, green, blue = (int(255 * min(1.0, max(0.0, c))) for c in part.colour)
        colour_pen.polygon(outline, fill=(red, green, blue))
        cover_pen.polygon(outline, fill=255)
    alpha = np.asarray(cover.reduce(SUPERSAMPLING), dtype=np.float32) / 255.0
    premultiplied = np.asarray(colours.reduce(SUPERSAMPLING), dtype=np.float32) / 255.0
    pure = premultiplied / np.maximum(alpha, 0.25)[..., None]
    return Drawing(np.clip(pure * texture(rng, name, size, turn)[..., None], 0.0, 1.0), alpha)

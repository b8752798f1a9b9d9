"""Shapes that every drawn object is made of: convex outlines in a local frame, painted in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
RGB = tuple[float, float, float]

ELLIPSE_CORNERS = 20
"""Corners of the polygon that stands for an ellipse; no difference is visible beyond this at 112 px."""


@dataclass(frozen=True)
class Part:
    """One polygon of an object: corners (x right, y down, object about 2 wide) and colour in [0, 1]."""

    points: Points
    colour: RGB


def ellipse(x: float, y: float, rx: float, ry: float, colour: RGB, *, turn: float = 0.0) -> Part:
    """Return an ellipse with centre ``(x, y)``, half axes ``rx`` and ``ry``, turned by ``turn`` radians."""
    angle = np.linspace(0.0, 2.0 * np.pi, ELLIPSE_CORNERS, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    c, s = np.cos(turn), np.sin(turn)
    return Part(np.stack([x + c * u - s * v, y + s * u + c * v], axis=1), colour)


def box(left: float, top: float, right: float, bottom: float, colour: RGB) -> Part:
    """Return an axis-parallel rectangle."""
    return Part(
        np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=np.float64), colour
    )


def polygon(corners: list[tuple[float, float]], colour: RGB) -> Part:
    """Return the polygon with the given corners."""
    return Part(np.array(corners, dtype=np.float64), colour)


def limb(x0: float, y0: float, x1: float, y1: float, width0: float, width1: float, colour: RGB) -> Part:
    """Return a tapering bar from ``(x0, y0)`` to ``(x1, y1)``: legs, necks, tails, poles."""
    length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-6)
    nx, ny = -(y1 - y0) / length / 2.0, (x1 - x0) / length / 2.0
    corners = [
        (x0 + nx * width0, y0 + ny * width0),
        (x1 + nx * width1, y1 + ny * width1),
        (x1 - nx * width1, y1 - ny * width1),
        (x0 - nx * width0, y0 - ny * width0),
    ]
    return polygon(corners, colour)


def curve(points: list[tuple[float, float]], width: float, colour: RGB) -> list[Part]:
    """Return bars joining ``points``: bent tails and handles."""
    return [limb(*a, *b, width, width, colour) for a, b in pairwise(points)]


def shade(colour: RGB, factor: float) -> RGB:
    """Return ``colour`` made darker (factor below 1) or brighter (above 1)."""
    red, green, blue = (min(1.0, c * factor) for c in colour)
    return red, green, blue


def paint(rng: np.random.Generator) -> RGB:
    """Return a random colour of man-made things: any hue, mostly saturated, sometimes grey."""
    hue, value = rng.uniform(0.0, 6.0), rng.uniform(0.35, 1.0)
    saturation = rng.uniform(0.45, 1.0) if rng.random() < 0.8 else rng.uniform(0.0, 0.15)
    channel = [
        value * (1.0 - saturation * min(1.0, max(0.0, abs((hue + k) % 6.0 - 3.0) - 1.0)))
        for k in (3.0, 1.0, 5.0)
    ]
    return channel[0], channel[1], channel[2]

"""What objects are made of: colours and textures that are typical of a class, without belonging to it alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vpl_lightning.data.scenes.backgrounds import smooth_noise
from vpl_lightning.data.scenes.primitives import RGB, paint

Field = npt.NDArray[np.float32]
"""A value for every pixel, shape (H, W)."""

TYPICAL_SHARE = 0.85
"""Share of objects with a colour typical of their class, and, apart from that, with a typical texture."""

COLOURS: dict[str, tuple[RGB, ...]] = {
    "train": ((0.10, 0.40, 0.26), (0.52, 0.10, 0.16), (0.16, 0.24, 0.45)),
    "boat": ((0.55, 0.34, 0.18), (0.90, 0.88, 0.82), (0.70, 0.16, 0.12)),
    "car": ((0.85, 0.12, 0.12), (0.95, 0.78, 0.12), (0.15, 0.35, 0.80)),
    "bird": ((0.95, 0.50, 0.12), (0.45, 0.22, 0.62), (0.20, 0.42, 0.85)),
    "plane": ((0.90, 0.90, 0.93), (0.72, 0.75, 0.80)),
    "horse": ((0.45, 0.25, 0.12), (0.14, 0.12, 0.12), (0.62, 0.40, 0.22)),
    "cat": ((0.50, 0.50, 0.54), (0.86, 0.54, 0.22), (0.25, 0.23, 0.24)),
    "chair": ((0.76, 0.56, 0.34), (0.42, 0.26, 0.14)),
    "umbrella": ((0.86, 0.16, 0.50), (0.10, 0.66, 0.68), (0.95, 0.85, 0.20)),
    "dog": ((0.90, 0.84, 0.74), (0.70, 0.54, 0.36), (0.32, 0.22, 0.16)),
}
"""Typical colours of every class; several overlap with other classes and with backgrounds."""

COLOUR_SPREAD = 0.06
"""Standard deviation of a typical colour, a channel."""


def typical_colour(rng: np.random.Generator, name: str) -> RGB:
    """Return the main colour of an object: mostly typical of its class, sometimes any paint."""
    if rng.random() >= TYPICAL_SHARE:
        return paint(rng)
    choice = np.array(COLOURS[name][rng.integers(len(COLOURS[name]))])
    red, green, blue = np.clip(choice + rng.normal(0.0, COLOUR_SPREAD, 3), 0.05, 1.0).tolist()
    return red, green, blue


def _panels(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Upright seams, as on coaches."""
    seams = ((u * rng.uniform(13.0, 18.0)) % 1.0) < 0.3
    return np.float32(0.15) * np.sign(v) - seams.astype(np.float32)


def _planks(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Level boards, staggered."""
    level = v * rng.uniform(12.0, 17.0)
    butt = ((u * 3.0 + 0.37 * np.floor(level)) % 1.0) < 0.06
    return -np.asarray((level % 1.0 < 0.3) | butt, dtype=np.float32)


def _gloss(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Broad slanting reflections."""
    wave: Field = np.sin((u + v) * rng.uniform(7.0, 11.0) + rng.uniform(0.0, 6.0)) ** 3
    return wave


def _feathers(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Rows of scales."""
    pitch = rng.uniform(34.0, 46.0)
    scales: Field = np.sin(u * pitch) * np.sin(v * pitch)
    return scales


def _rivets(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """A fine grid of sheet edges."""
    pitch = rng.uniform(9.0, 12.0)
    return -np.asarray(((u * pitch) % 1.0 < 0.16) | ((v * pitch) % 1.0 < 0.16), dtype=np.float32)


def _hair(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """A short coat: faint slanting strokes."""
    size = u.shape[1]
    strokes: Field = smooth_noise(rng, size, size // 10, size // 3) * np.float32(0.5)
    return strokes


def _tabby(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Wavy stripes."""
    bands: Field = np.sin(u * rng.uniform(38.0, 52.0) + 2.0 * np.sin(v * 12.0))
    return bands


def _grain(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Wood grain: long level streaks."""
    size = u.shape[1]
    streaks: Field = smooth_noise(rng, size, size // 2, 7) * np.float32(0.7)
    return streaks


def _cloth(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Dots on cloth."""
    pitch = rng.uniform(11.0, 15.0)
    x, y = (u * pitch) % 1.0 - 0.5, (v * pitch) % 1.0 - 0.5
    return np.asarray(x**2 + y**2 < 0.09, dtype=np.float32) * 1.5


def _curls(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """A woolly coat of small blotches."""
    size = u.shape[1]
    blotches: Field = smooth_noise(rng, size, size // 5, size // 5)
    return blotches


WEAVES: dict[str, Callable[[np.random.Generator, Field, Field], Field]] = {
    "train": _panels,
    "boat": _planks,
    "car": _gloss,
    "bird": _feathers,
    "plane": _rivets,
    "horse": _hair,
    "cat": _tabby,
    "chair": _grain,
    "umbrella": _cloth,
    "dog": _curls,
}
"""Texture typical of every class, over the object's own axes, about [-1, 1]."""


def texture(rng: np.random.Generator, name: str, size: int, turn: float) -> Field:
    """Return a factor for every pixel: light from one side times the surface.

    Args:
        rng: Source of the choices.
        name: Class of the object.
        size: Side of the square canvas in pixels.
        turn: Tilt of the object in radians; the surface turns with it.
    """
    line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    light = np.cos(angle) * line[:, None] + np.sin(angle) * line[None, :]
    names = tuple(WEAVES)
    kind = name if rng.random() < TYPICAL_SHARE else names[rng.integers(len(names))]
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = c * line[None, :] + s * line[:, None], c * line[:, None] - s * line[None, :]
    surface = WEAVES[kind](rng, u, v) * rng.uniform(0.12, 0.28)
    factor: Field = (1.0 + rng.uniform(0.05, 0.2) * light + surface).astype(np.float32)
    return factor

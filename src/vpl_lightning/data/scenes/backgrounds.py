"""Eight kinds of background, each with its own texture and colours; every function fills a square."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

Canvas = npt.NDArray[np.float32]

HORIZON_SHARE = 0.35
"""Share of grounds (not sky, not wall) that end at a horizon with hazy air above."""


def smooth_noise(rng: np.random.Generator, size: int, cells_y: int, cells_x: int) -> Canvas:
    """Return noise of about unit variance whose blobs are ``size / cells`` pixels high and wide."""
    grid = rng.standard_normal((cells_y + 1, cells_x + 1), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _tint(rng: np.random.Generator, colour: tuple[float, float, float], spread: float = 0.05) -> Canvas:
    common = rng.normal(0.0, spread)
    tone: Canvas = (np.array(colour) + common + rng.normal(0.0, spread * 0.7, 3)).astype(np.float32)
    return tone


def _mix(first: Canvas, second: Canvas, share: npt.NDArray[np.floating]) -> Canvas:
    weight = np.clip(share, 0.0, 1.0)[..., None]
    mixed: Canvas = (first * (1.0 - weight) + second * weight).astype(np.float32)
    return mixed


def _axes(size: int) -> tuple[Canvas, Canvas]:
    line = np.linspace(0.0, 1.0, size, dtype=np.float32)
    return line[:, None], line[None, :]


def water(rng: np.random.Generator, size: int) -> Canvas:
    """Return rippled water with bright crests."""
    y, x = _axes(size)
    bend = 0.02 * smooth_noise(rng, size, 4, 6)
    phase = (y + bend) * rng.uniform(60.0, 110.0) + 2.0 * np.sin(
        x * rng.uniform(6.0, 16.0) + rng.uniform(0.0, 6.0)
    )
    crest = 0.5 + 0.5 * np.sin(phase) + 0.25 * smooth_noise(rng, size, 28, 9)
    deep = _tint(rng, ((0.08, 0.28, 0.48), (0.10, 0.40, 0.46), (0.22, 0.32, 0.42))[rng.integers(3)])
    return _mix(deep, deep + 0.28, crest * rng.uniform(0.5, 1.0))


def railway(rng: np.random.Generator, size: int) -> Canvas:
    """Return gravel with sleepers and steel rails, seen from the side or along the track."""
    y, x = _axes(size)
    gravel = _tint(rng, (0.46, 0.42, 0.38)) + 0.09 * smooth_noise(rng, size, size // 2, size // 2)[..., None]
    sleeper, steel = _tint(rng, (0.28, 0.20, 0.15), 0.03), _tint(rng, (0.70, 0.70, 0.74), 0.03)
    along = rng.random() < 0.5
    u, v = (x, y) if along else (y, x)
    image: Canvas = gravel
    for centre in np.arange(rng.uniform(0.1, 0.3), 1.1, rng.uniform(0.38, 0.5)):
        across = np.abs(u - centre)
        ties = (across < 0.15) & (((v * rng.uniform(7.0, 11.0)) % 1.0) < 0.42)
        image = _mix(image, sleeper, ties.astype(np.float32))
        rails = (np.abs(across - 0.09) < 0.016) & (v > -1.0)
        image = _mix(image, steel, rails.astype(np.float32))
    return image


def grass(rng: np.random.Generator, size: int) -> Canvas:
    """Return a meadow of upright blades, sometimes with flowers."""
    blades = 0.6 * smooth_noise(rng, size, size // 6, size // 2) + 0.5 * smooth_noise(rng, size, 6, 6)
    green = _tint(rng, ((0.24, 0.50, 0.16), (0.36, 0.54, 0.20), (0.16, 0.38, 0.14))[rng.integers(3)])
    image = _mix(green * 0.7, green * 1.35, 0.5 + 0.4 * blades)
    if rng.random() < 0.4:
        spots = smooth_noise(rng, size, size // 4, size // 4) > 2.0
        image = _mix(image, _tint(rng, (0.95, 0.90, 0.55), 0.1), spots.astype(np.float32))
    return image


def road(rng: np.random.Generator, size: int) -> Canvas:
    """Return asphalt with dashed or solid lane markings, level or upright."""
    y, x = _axes(size)
    tar = _tint(rng, (0.32, 0.32, 0.34)) + 0.04 * rng.standard_normal((size, size, 1), dtype=np.float32)
    paint = (
        _tint(rng, (0.92, 0.92, 0.88), 0.03) if rng.random() < 0.7 else _tint(rng, (0.90, 0.74, 0.20), 0.03)
    )
    u, v = (y, x) if rng.random() < 0.65 else (x, y)
    u = u + rng.uniform(-0.15, 0.15) * v
    dashes = ((v * rng.uniform(3.0, 5.0) + rng.uniform()) % 1.0) < 0.6
    start, gap = rng.uniform(0.12, 0.35), rng.uniform(0.28, 0.42)
    image: Canvas = tar.astype(np.float32)
    for lane in range(3):
        line = (np.abs(u - start - lane * gap) < 0.018) & (dashes | (lane == 0))
        image = _mix(image, paint, line.astype(np.float32))
    return image


def sky(rng: np.random.Generator, size: int) -> Canvas:
    """Return clear, cloudy or evening air."""
    y, _ = _axes(size)
    kind = int(rng.choice(3, p=(0.6, 0.2, 0.2)))
    top = _tint(rng, ((0.25, 0.50, 0.85), (0.55, 0.62, 0.70), (0.42, 0.36, 0.60))[kind])
    low = _tint(rng, ((0.68, 0.83, 0.96), (0.78, 0.81, 0.84), (0.98, 0.66, 0.42))[kind])
    image = _mix(top, low, np.broadcast_to(y, (size, size)) * 1.1)
    cloud = 0.7 * smooth_noise(rng, size, 5, 3) + 0.3 * smooth_noise(rng, size, 12, 8)
    return _mix(image, _tint(rng, (0.96, 0.96, 0.97), 0.02), (cloud - rng.uniform(-0.1, 0.8)) * 0.9)


def sand(rng: np.random.Generator, size: int) -> Canvas:
    """Return sand with wind ripples and scattered pebbles."""
    y, x = _axes(size)
    ripple = np.sin((y + 0.25 * x + 0.05 * smooth_noise(rng, size, 4, 4)) * rng.uniform(25.0, 45.0))
    grain = rng.standard_normal((size, size), dtype=np.float32)
    base = _tint(rng, ((0.85, 0.74, 0.52), (0.78, 0.62, 0.42), (0.90, 0.82, 0.66))[rng.integers(3)])
    image = base + (0.05 * ripple + 0.045 * grain)[..., None]
    pebbles = smooth_noise(rng, size, size // 5, size // 5) > 2.1
    return _mix(image.astype(np.float32), base * 0.6, pebbles.astype(np.float32))


def snow(rng: np.random.Generator, size: int) -> Canvas:
    """Return drifts of snow with bluish hollows and falling flakes."""
    drift = smooth_noise(rng, size, 5, 3) + 0.3 * smooth_noise(rng, size, 14, 10)
    white = _tint(rng, (0.93, 0.95, 0.98), 0.025)
    image = _mix(white, _tint(rng, (0.70, 0.78, 0.90)), 0.35 + 0.45 * drift)
    flakes = smooth_noise(rng, size, size // 3, size // 3) > rng.uniform(1.5, 2.3)
    return _mix(image, np.ones(3, dtype=np.float32), flakes.astype(np.float32))


def wall(rng: np.random.Generator, size: int) -> Canvas:
    """Return a wall of bricks, striped paper, tiles or plaster in any light colour."""
    y, x = _axes(size)
    kind = int(rng.integers(4))
    base = _tint(
        rng, ((0.62, 0.30, 0.22), (0.80, 0.72, 0.60), (0.72, 0.80, 0.78), (0.82, 0.78, 0.80))[kind], 0.06
    )
    rows = rng.uniform(8.0, 13.0)
    if kind == 0:
        line = np.floor(y * rows)
        joint = ((y * rows) % 1.0 < 0.14) | ((x * rows * 0.5 + 0.5 * (line % 2.0)) % 1.0 < 0.08)
    elif kind == 1:
        joint = np.broadcast_to((x * rows) % 1.0 < 0.4, (size, size))
    elif kind == 2:
        joint = ((x * rows * 0.7) % 1.0 < 0.08) | ((y * rows * 0.7) % 1.0 < 0.08)
    else:
        joint = np.zeros((size, size), dtype=np.bool_)
    tone = (
        base
        + 0.03 * smooth_noise(rng, size, 6, 6)[..., None]
        + 0.03 * smooth_noise(rng, size, size // 3, size // 3)[..., None]
    )
    return _mix(tone.astype(np.float32), base * (0.80 if kind else 1.35), joint.astype(np.float32))


PAINTERS: dict[str, Callable[[np.random.Generator, int], Canvas]] = {
    "water": water,
    "railway": railway,
    "grass": grass,
    "road": road,
    "sky": sky,
    "sand": sand,
    "snow": snow,
    "wall": wall,
}
"""Painter of every kind of background, by the English word that prompts use."""


def draw_background(rng: np.random.Generator, kind: str, size: int) -> Canvas:
    """Return a background of the given kind: float RGB of shape (size, size, 3), about [0, 1]."""
    image = PAINTERS[kind](rng, size)
    if kind not in ("sky", "wall") and rng.random() < HORIZON_SHARE:
        row = int(size * rng.uniform(0.08, 0.30))
        haze = _tint(rng, (0.78, 0.84, 0.90), 0.05)
        image[:row] = haze + 0.03 * smooth_noise(rng, size, 4, 3)[:row, :, None]
    return image

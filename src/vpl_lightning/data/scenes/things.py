"""Vehicles and furniture: each function returns the parts of one thing with its own make, colour and view."""

from __future__ import annotations

import numpy as np

from vpl_lightning.data.scenes.primitives import RGB, Part, box, curve, ellipse, limb, paint, polygon, shade
from vpl_lightning.data.scenes.surfaces import typical_colour

TYRE: RGB = (0.08, 0.08, 0.09)
METAL: RGB = (0.72, 0.73, 0.76)
GLASS: tuple[RGB, ...] = ((0.70, 0.85, 0.95), (0.20, 0.26, 0.34), (0.95, 0.90, 0.60))
WOOD: tuple[RGB, ...] = ((0.55, 0.35, 0.18), (0.35, 0.22, 0.12), (0.78, 0.60, 0.38))


def _glass(rng: np.random.Generator) -> RGB:
    return GLASS[rng.integers(len(GLASS))]


def _wheel(x: float, y: float, radius: float) -> list[Part]:
    return [ellipse(x, y, radius, radius, TYRE), ellipse(x, y, radius * 0.5, radius * 0.5, METAL)]


def train(rng: np.random.Generator) -> list[Part]:
    """Return a train: an engine, with a chimney or a slanted nose, and one or two coaches full of windows."""
    body, roof, glass = typical_colour(rng, "train"), paint(rng), _glass(rng)
    coaches = int(rng.integers(1, 3))
    length = 2.4 / (coaches + 1)
    parts: list[Part] = []
    for index in range(coaches + 1):
        left = -1.2 + index * length
        right = left + length - 0.05
        tone = body if index == coaches else shade(body, rng.uniform(0.75, 1.2))
        parts += [
            box(left, -0.40, right, 0.28, tone),
            box(left, -0.48, right, -0.36, roof),
            box(left, 0.10, right, 0.17, roof),
        ]
        for x in np.linspace(left + 0.12, right - 0.12, 4 - coaches + 1):
            parts.append(box(x - 0.08, -0.26, x + 0.08, 0.0, glass))
        for x in np.linspace(left + 0.14, right - 0.14, 3):
            parts += _wheel(float(x), 0.34, 0.12)
    if rng.random() < 0.5:
        parts += [box(1.02, -0.80, 1.16, -0.36, TYRE), box(0.97, -0.86, 1.21, -0.76, roof)]
        parts.append(polygon([(1.15, 0.10), (1.42, 0.42), (1.15, 0.42)], METAL))
    else:
        parts.append(polygon([(1.13, -0.46), (1.30, -0.25), (1.42, 0.30), (1.13, 0.30)], shade(body, 0.9)))
    return parts


def boat(rng: np.random.Generator) -> list[Part]:
    """Return a boat: a hull with one or two sails, or with a cabin and a funnel."""
    hull, trim = typical_colour(rng, "boat"), paint(rng)
    sailing = rng.random() < 0.6
    parts: list[Part] = []
    if sailing:
        cloth = (0.96, 0.95, 0.90) if rng.random() < 0.6 else paint(rng)
        parts.append(limb(0.0, 0.40, 0.0, -1.0, 0.07, 0.05, (0.45, 0.30, 0.18)))
        parts.append(polygon([(0.06, -0.95), (0.06, 0.25), (0.80, 0.25)], cloth))
        if rng.random() < 0.7:
            parts.append(polygon([(-0.06, -0.80), (-0.06, 0.25), (-0.62, 0.25)], shade(cloth, 0.82)))
    else:
        glass = _glass(rng)
        parts += [box(-0.55, -0.15, 0.35, 0.40, (0.92, 0.92, 0.92)), box(-0.10, -0.55, 0.12, -0.10, trim)]
        parts += [box(x, 0.0, x + 0.16, 0.18, glass) for x in (-0.45, -0.18, 0.09)]
    parts.append(polygon([(-1.0, 0.32), (1.10, 0.32), (0.78, 0.80), (-0.75, 0.80)], hull))
    parts.append(polygon([(-1.0, 0.32), (1.10, 0.32), (1.04, 0.42), (-0.95, 0.42)], trim))
    return parts


def car(rng: np.random.Generator) -> list[Part]:
    """Return a car seen from the side: two wheels, bonnet, cabin with windows; saloon, van or pick-up."""
    body, glass = typical_colour(rng, "car"), _glass(rng)
    make = int(rng.integers(3))
    roof_left, roof_right = ((-0.45, 0.30), (-0.92, 0.42), (-0.05, 0.42))[make]
    cabin_left = (-0.78, -0.98, -0.14)[make]
    parts = [
        polygon(
            [(cabin_left, -0.05), (roof_left, -0.50), (roof_right, -0.50), (0.66, -0.05)], shade(body, 0.9)
        )
    ]
    middle = (roof_left + roof_right) / 2.0
    parts.append(
        polygon(
            [
                (cabin_left + 0.16, -0.06),
                (roof_left + 0.06, -0.42),
                (middle - 0.03, -0.42),
                (middle - 0.03, -0.06),
            ],
            glass,
        )
    )
    parts.append(
        polygon(
            [(middle + 0.05, -0.06), (middle + 0.05, -0.42), (roof_right - 0.04, -0.42), (0.52, -0.06)], glass
        )
    )
    parts.append(polygon([(-1.02, -0.06), (0.72, -0.08), (1.06, 0.06), (1.08, 0.34), (-1.04, 0.34)], body))
    parts += [
        ellipse(1.0, 0.10, 0.07, 0.07, (1.0, 0.95, 0.60)),
        box(-1.05, 0.02, -0.96, 0.14, (0.85, 0.10, 0.10)),
    ]
    parts += _wheel(-0.58, 0.36, 0.23) + _wheel(0.60, 0.36, 0.23)
    return parts


def plane(rng: np.random.Generator) -> list[Part]:
    """Return a plane: slender fuselage, swept wings, tail fin, a row of windows and a painted stripe."""
    body = typical_colour(rng, "plane")
    trim, sweep = paint(rng), rng.uniform(0.30, 0.60)
    parts = [
        polygon(
            [(0.25, -0.08), (-0.05, -0.08), (-0.20 - sweep, -0.75), (-0.05 - sweep, -0.75)], shade(body, 0.7)
        )
    ]
    parts.append(polygon([(-0.72, -0.05), (-1.02, -0.60), (-1.20, -0.60), (-1.10, 0.0)], trim))
    parts.append(ellipse(0.0, 0.0, 1.18, 0.19, body))
    parts.append(box(-0.85, 0.02, 0.95, 0.08, trim))
    parts += [box(x, -0.10, x + 0.06, -0.03, (0.20, 0.26, 0.34)) for x in np.linspace(-0.6, 0.7, 8)]
    parts.append(
        polygon(
            [(0.35, 0.06), (-0.10, 0.06), (-0.30 - sweep, 0.85), (-0.10 - sweep, 0.85)], shade(body, 0.85)
        )
    )
    parts.append(ellipse(0.05, 0.42, 0.16, 0.08, trim))
    parts.append(polygon([(-0.85, 0.02), (-1.05, 0.02), (-1.25, 0.28), (-1.10, 0.28)], shade(body, 0.8)))
    return parts


def chair(rng: np.random.Generator) -> list[Part]:
    """Return a chair: a seat in slight perspective, four thin legs and a back of slats, bars or one panel."""
    frame = typical_colour(rng, "chair")
    cushion, leg = (paint(rng) if rng.random() < 0.3 else shade(frame, 1.1)), rng.uniform(0.09, 0.15)
    lean = rng.uniform(-0.12, 0.12)
    parts = [limb(x, 0.15, x, 0.78, leg, leg * 0.8, shade(frame, 0.6)) for x in (-0.38, 0.56)]
    parts += [limb(x, 0.20, x + lean, -1.0, leg, leg, frame) for x in (-0.45, 0.55)]
    make = int(rng.integers(3))
    if make == 0:
        parts += [limb(x, 0.10, x + lean, -0.92, 0.07, 0.07, frame) for x in (-0.20, 0.05, 0.30)]
    elif make == 1:
        parts += [limb(-0.45 + lean, y, 0.55 + lean, y, 0.13, 0.13, frame) for y in (-0.62, -0.32)]
    else:
        parts.append(
            polygon([(-0.45 + lean, -0.92), (0.55 + lean, -0.92), (0.55, -0.15), (-0.45, -0.15)], cushion)
        )
    parts.append(limb(-0.52 + lean, -0.94, 0.62 + lean, -0.94, 0.14, 0.14, shade(frame, 1.1)))
    parts.append(polygon([(-0.50, 0.02), (0.60, 0.02), (0.48, 0.28), (-0.68, 0.28)], cushion))
    parts += [limb(x, 0.26, x + 0.02, 1.0, leg * 1.1, leg * 0.9, frame) for x in (-0.60, 0.40)]
    return parts


def umbrella(rng: np.random.Generator) -> list[Part]:
    """Return an open umbrella: a dome of coloured panels with scalloped rim, a pole and a hooked handle."""
    first, pole = typical_colour(rng, "umbrella"), WOOD[rng.integers(len(WOOD))]
    second = paint(rng) if rng.random() < 0.65 else shade(first, 0.8)
    height, panels = rng.uniform(0.65, 0.95), int(rng.integers(4, 8))
    parts = [limb(0.0, -0.30, 0.0, 0.85, 0.07, 0.07, pole)]
    parts += curve([(0.0, 0.82), (0.06, 0.97), (0.19, 0.97), (0.24, 0.84)], 0.07, pole)
    edges = -np.cos(np.linspace(0.0, np.pi, panels + 1))
    for index in range(panels):
        left, right = float(edges[index]), float(edges[index + 1])
        rim = np.linspace(np.pi, 0.0, 7)
        corners = [
            ((left + right) / 2 + (right - left) / 2 * np.cos(t), -0.06 - 0.09 * np.sin(t)) for t in rim
        ]
        side = [(x * np.cos(t), -0.06 - height * np.sin(t)) for x, t in ((right, 0.6), (right, 1.1))]
        top = [(0.0, -0.06 - height)]
        other = [(x * np.cos(t), -0.06 - height * np.sin(t)) for x, t in ((left, 1.1), (left, 0.6))]
        parts.append(polygon(corners + side + top + other, (first, second)[index % 2]))
    parts.append(limb(0.0, -0.02 - height, 0.0, -0.18 - height, 0.06, 0.04, pole))
    return parts

"""Animals: each function returns the parts of one individual with its own build, pose and coat."""

from __future__ import annotations

import numpy as np

from vpl_lightning.data.scenes.primitives import Part, curve, ellipse, limb, paint, polygon, shade
from vpl_lightning.data.scenes.surfaces import typical_colour

DARK = (0.06, 0.06, 0.07)


def _legs(
    rng: np.random.Generator,
    *,
    front: float,
    back: float,
    top: float,
    foot: float,
    width: float,
    colour: tuple[float, float, float],
) -> list[Part]:
    """Return four legs in a random phase of walking; the far pair is darker and comes first."""
    parts: list[Part] = []
    stride = rng.uniform(0.0, 0.28)
    for far, sign in ((True, -1.0), (False, 1.0)):
        tone = shade(colour, 0.65 if far else 0.95)
        for x in (front, back):
            swing = sign * stride * (1.0 if x == front else -1.0)
            parts.append(limb(x + 0.05 * sign, top, x + swing, foot, width * 1.3, width * 0.8, tone))
    return parts


def bird(rng: np.random.Generator) -> list[Part]:
    """Return a bird, flying with raised or lowered wings or standing on thin legs."""
    body = typical_colour(rng, "bird")
    wing, beak = shade(body, rng.uniform(0.5, 0.8)), (0.95, 0.62, 0.10)
    parts = [polygon([(-0.50, 0.0), (-1.0, -0.16), (-0.95, 0.06), (-1.0, 0.2)], wing)]
    flying = rng.random() < 0.6
    if flying:
        lift = rng.uniform(0.6, 1.0) * (1.0 if rng.random() < 0.3 else -1.0)
        parts.append(
            polygon([(-0.12, -0.05), (0.30, -0.05), (-0.05, lift * 0.9), (-0.35, lift)], shade(wing, 0.8))
        )
    else:
        parts += [limb(x, 0.2, x + rng.uniform(-0.08, 0.08), 0.78, 0.06, 0.06, beak) for x in (-0.08, 0.12)]
    parts.append(ellipse(0.0, 0.0, 0.58, 0.30, body, turn=rng.uniform(-0.3, 0.1)))
    parts.append(ellipse(0.52, -0.25, 0.22, 0.21, shade(body, rng.uniform(0.8, 1.3))))
    parts.append(polygon([(0.68, -0.32), (1.0, -0.22), (0.68, -0.14)], beak))
    parts.append(ellipse(0.58, -0.30, 0.05, 0.05, DARK))
    if flying:
        parts.append(polygon([(-0.28, 0.0), (0.26, 0.0), (-0.20, lift), (-0.62, lift * 0.95)], wing))
    else:
        parts.append(ellipse(-0.12, 0.0, 0.38, 0.17, wing, turn=-0.2))
    return parts


def horse(rng: np.random.Generator) -> list[Part]:
    """Return a horse: long legs, long neck and face, mane and hanging tail; standing or grazing."""
    body = typical_colour(rng, "horse")
    mane = shade(body, 0.4) if rng.random() < 0.7 else (0.9, 0.86, 0.75)
    parts = _legs(rng, front=0.42, back=-0.48, top=0.10, foot=0.98, width=0.13, colour=body)
    parts += curve([(-0.66, -0.18), (-0.86, 0.05), (-0.90, 0.55)], 0.13, mane)
    parts.append(ellipse(-0.05, -0.05, 0.68, 0.30, body))
    hx, hy = (0.86, -0.82) if rng.random() < 0.75 else (1.0, 0.30)
    parts.append(limb(0.45, -0.10, hx, hy, 0.42, 0.20, body))
    parts.append(limb(0.30, -0.25, hx - 0.10, hy - 0.10, 0.14, 0.12, mane))
    parts.append(limb(hx - 0.06, hy - 0.02, hx + 0.26, hy + 0.26, 0.26, 0.17, shade(body, 1.1)))
    parts.append(
        polygon([(hx - 0.12, hy - 0.08), (hx - 0.06, hy - 0.28), (hx + 0.04, hy - 0.08)], shade(body, 0.8))
    )
    parts.append(ellipse(hx + 0.03, hy, 0.04, 0.04, DARK))
    return parts


def dog(rng: np.random.Generator) -> list[Part]:
    """Return a dog: short legs, blunt snout, hanging ears, raised tail and sometimes a collar."""
    body = typical_colour(rng, "dog")
    ear = shade(body, rng.uniform(0.4, 0.75))
    parts = _legs(rng, front=0.42, back=-0.48, top=0.15, foot=0.80, width=0.20, colour=body)
    parts += curve([(-0.62, -0.05), (-0.86, -0.35), (-0.80, -0.35 - rng.uniform(0.1, 0.45))], 0.13, body)
    parts.append(ellipse(-0.05, 0.05, 0.68, 0.32, body))
    if rng.random() < 0.35:
        parts.append(ellipse(rng.uniform(-0.4, 0.2), 0.0, 0.22, 0.18, ear))
    parts.append(limb(0.42, 0.0, 0.62, -0.42, 0.40, 0.34, body))
    if rng.random() < 0.5:
        parts.append(limb(0.40, -0.12, 0.72, -0.06, 0.12, 0.12, paint(rng)))
    parts.append(ellipse(0.62, -0.45, 0.32, 0.28, body))
    parts.append(ellipse(0.90, -0.36, 0.24, 0.15, shade(body, 1.15)))
    parts.append(ellipse(1.08, -0.40, 0.08, 0.07, DARK))
    parts.append(ellipse(0.44, -0.34, 0.13, 0.32, ear, turn=rng.uniform(-0.1, 0.4)))
    parts.append(ellipse(0.70, -0.54, 0.05, 0.05, DARK))
    return parts


def cat(rng: np.random.Generator) -> list[Part]:
    """Return a cat that faces us: round head, pointed ears, curled tail, often stripes; sitting or lying."""
    fur = typical_colour(rng, "cat")
    stripe, eye = shade(fur, 0.55), ((0.45, 0.85, 0.25) if rng.random() < 0.6 else (0.95, 0.80, 0.20))
    sitting = rng.random() < 0.6
    hx, hy = (0.0, -0.50) if sitting else (0.55, -0.15)
    if sitting:
        parts = curve([(0.35, 0.80), (0.80, 0.70), (0.92, 0.30), (0.75, rng.uniform(-0.2, 0.1))], 0.15, fur)
        parts.append(ellipse(0.0, 0.40, 0.50, 0.60, fur))
        bars = [limb(-0.42, y, 0.42, y + 0.04, 0.07, 0.07, stripe) for y in (0.20, 0.42, 0.64)]
        paws = [ellipse(x, 0.94, 0.17, 0.10, shade(fur, 1.2)) for x in (-0.2, 0.2)]
    else:
        parts = curve([(-0.80, 0.35), (-1.05, 0.10), (-0.95, -0.30), (-0.75, -0.40)], 0.15, fur)
        parts.append(ellipse(-0.15, 0.28, 0.80, 0.36, fur))
        bars = [limb(x, -0.02, x - 0.05, 0.50, 0.08, 0.06, stripe) for x in (-0.6, -0.35, -0.1)]
        paws = [ellipse(x, 0.60, 0.22, 0.09, shade(fur, 1.2)) for x in (0.35, 0.75)]
    parts += (bars if rng.random() < 0.6 else []) + paws
    for side in (-1.0, 1.0):
        ear = [(hx + side * 0.38, hy - 0.05), (hx + side * 0.34, hy - 0.58), (hx + side * 0.06, hy - 0.28)]
        parts.append(polygon(ear, shade(fur, 0.85)))
    parts.append(ellipse(hx, hy, 0.42, 0.36, fur))
    for side in (-1.0, 1.0):
        parts.append(ellipse(hx + side * 0.16, hy - 0.06, 0.08, 0.09, eye))
        parts.append(ellipse(hx + side * 0.16, hy - 0.06, 0.03, 0.08, DARK))
    parts.append(
        polygon([(hx - 0.06, hy + 0.08), (hx + 0.06, hy + 0.08), (hx, hy + 0.16)], (0.90, 0.50, 0.50))
    )
    return parts

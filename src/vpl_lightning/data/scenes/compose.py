"""Composes scenes: which classes stand where, on which background, in front of which others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vpl_lightning.data.scenes.backgrounds import PAINTERS, draw_background
from vpl_lightning.data.scenes.captions import describe
from vpl_lightning.data.scenes.objects import BUILDERS, draw_object

CLASSES: tuple[str, ...] = tuple(BUILDERS)
"""Foreground classes; class ``i`` has the value ``i + 1`` in masks."""

BACKGROUNDS: tuple[str, ...] = tuple(PAINTERS)
"""Kinds of background."""

HOMES = {
    "train": "railway",
    "boat": "water",
    "car": "road",
    "bird": "sky",
    "plane": "sky",
    "horse": "grass",
    "cat": "wall",
    "chair": "wall",
    "umbrella": "sand",
    "dog": "snow",
}
"""The background that a class mostly stands on."""

HOME_SHARE = 0.78
"""Share of scenes whose background is the home of their main object; the others take any other kind."""

COUNT_SHARES = (0.55, 0.32, 0.13)
"""Shares of scenes with one, two and three classes."""

RADIUS_SHARES = ((0.40, 0.62), (0.28, 0.46), (0.22, 0.36))
"""Smallest and largest half width of objects as shares of the image side: with one, two, three classes."""

MIN_VISIBLE_SHARE = 0.35
"""Share of its pixels that a class must keep visible, or the object that hides it is placed again."""

MIN_VISIBLE_PIXELS = 40
"""Fewest pixels that a class shows at 112 px; scaled with the area of the image."""

PLACING_ATTEMPTS = 8
"""Attempts to place an object before it is left out."""

BACKGROUND_SHARE = 0.5
"""Share of captions that also name the background."""


@dataclass(frozen=True)
class Scene:
    """A drawn scene with its exact mask and its caption.

    Attributes:
        image: uint8 RGB of shape (H, W, 3).
        mask: uint8 of shape (H, W): 0 for background, class index + 1 elsewhere.
        labels: Classes present, 0-based and sorted.
        background: Kind of background, one of ``BACKGROUNDS``.
        caption: Plain English; names every class present and sometimes the background.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    labels: tuple[int, ...]
    background: str
    caption: str


def _choose(rng: np.random.Generator, home_share: float) -> tuple[list[int], str]:
    """Return distinct classes, the main one first, and the kind of background."""
    count = 1 + int(rng.choice(3, p=COUNT_SHARES))
    classes = [int(i) for i in rng.permutation(len(CLASSES))[:count]]
    home = HOMES[CLASSES[classes[0]]]
    if rng.random() < home_share:
        return classes, home
    others = [kind for kind in BACKGROUNDS if kind != home]
    return classes, others[rng.integers(len(others))]


def _place(
    rng: np.random.Generator,
    image: npt.NDArray[np.float32],
    mask: npt.NDArray[np.uint8],
    label: int,
    radii: tuple[float, float],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]] | None:
    """Return image and mask with one more object in front; ``None`` if it hides another or hardly shows."""
    size = mask.shape[0]
    radius = rng.uniform(*radii) * size
    margin = radius * 0.75
    centre = (rng.uniform(margin, size - margin), rng.uniform(margin, size - margin))
    drawing = draw_object(rng, CLASSES[label], size=size, centre=centre, radius=radius)
    solid = drawing.coverage >= 0.5
    if solid.sum() < MIN_VISIBLE_PIXELS * (size / 112) ** 2:
        return None
    for other in np.unique(mask[solid]):
        before = mask == other
        if other and (before & ~solid).sum() < MIN_VISIBLE_SHARE * before.sum():
            return None
    alpha = drawing.coverage[..., None]
    return image * (1.0 - alpha) + drawing.colour * alpha, np.where(solid, np.uint8(label + 1), mask)


def render_scene(seed: int, index: int, *, size: int = 112, home_share: float = HOME_SHARE) -> Scene:
    """Draw scene ``index`` of the endless series ``seed``.

    The result depends on the arguments only, not on what was drawn before.

    Args:
        seed: Series; use different series for training and evaluation.
        index: Position in the series.
        size: Side of the square image in pixels.
        home_share: Share of scenes whose background is the home of their main object.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
    classes, background = _choose(rng, home_share)
    image = draw_background(rng, background, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    radii = RADIUS_SHARES[len(classes) - 1]
    for label in rng.permutation(classes):
        for _ in range(PLACING_ATTEMPTS):
            placed = _place(rng, image, mask, int(label), radii)
            if placed is not None:
                image, mask = placed
                break
    labels = tuple(int(value) - 1 for value in np.unique(mask) if value)
    gain, offset = rng.uniform(0.85, 1.12), rng.uniform(-0.05, 0.05)
    pixels = np.clip((image * gain + offset) * 255.0, 0.0, 255.0).astype(np.uint8)
    named = background if rng.random() < BACKGROUND_SHARE else None
    return Scene(pixels, mask, labels, background, describe(rng, [CLASSES[i] for i in labels], named))

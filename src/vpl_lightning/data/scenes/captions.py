"""Plain English captions: what stands in a scene, and often where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NAME_TEMPLATES = (
    "a photo of a {}.",
    "a clean origami {}.",
    "a rendering of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a small {}.",
    "a {}.",
)
"""Templates filled with bare names, so that the first name needs no article of its own."""

SENTENCES = ("there is {}.", "we see {} here.", "look, {}!", "this is {}.", "{}.", "a scene with {}.")
"""Sentences filled with names that carry their article."""

PLACES = {
    "water": ("on the water", "in the water"),
    "railway": ("on the railway", "beside the railway"),
    "grass": ("on the grass", "in the grass"),
    "road": ("on the road", "beside the road"),
    "sky": ("in the sky", "in front of the sky"),
    "sand": ("on the sand", "in the sand"),
    "snow": ("in the snow", "on the snow"),
    "wall": ("by the wall", "in front of the wall"),
}
"""How a caption says where: phrases for every kind of background."""

BARE_SHARE = 0.6
"""Share of captions in the bare form of prompts; the others are sentences with articles."""


def with_article(name: str) -> str:
    """Return the name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def describe(rng: np.random.Generator, names: Sequence[str], background: str | None) -> str:
    """Return a caption that names the things, in random order, and the background unless it is ``None``.

    Without things the caption names the background alone, in the bare form that prompts use.

    Raises:
        ValueError: If there is nothing to name.
    """
    order = [names[i] for i in rng.permutation(len(names))]
    if not order:
        if background is None:
            raise ValueError("a caption needs a thing or a background to name; give at least one")
        return NAME_TEMPLATES[rng.integers(len(NAME_TEMPLATES))].format(background)
    place = "" if background is None else " " + PLACES[background][rng.integers(len(PLACES[background]))]
    if rng.random() < BARE_SHARE:
        listed = _listing([order[0], *(with_article(name) for name in order[1:])])
        return NAME_TEMPLATES[rng.integers(len(NAME_TEMPLATES))].format(listed + place)
    sentence = SENTENCES[rng.integers(len(SENTENCES))]
    return sentence.format(_listing([with_article(name) for name in order]) + place)

"""What the sections of ``speed.py`` have in common: a line of the table, and interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import cam_speed


@dataclass(frozen=True)
class Row:
    """One line of the table; medians over the rounds."""

    case: str
    seconds: float
    """An image, or a pass of phase 1."""
    ratio: float | None = None
    """Time over that of ``floor``, taken within a round."""
    floor: str = ""
    bytes_written: int | None = None
    """An image."""
    note: str = ""


def interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return seconds of each function in each round, in a new order each; a first round does not count."""
    seconds = cam_speed.measure({str(index): work for index, work in enumerate(functions)}, rounds)
    return [[wall for wall, _ in own] for own in seconds.values()]


def ratio_of(own: Sequence[float], floor: Sequence[float]) -> float:
    return median(one / other for one, other in zip(own, floor, strict=True))

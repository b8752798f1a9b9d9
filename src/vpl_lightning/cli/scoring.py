"""Counts pixels by true and predicted class, for masks and for maps under many background scores at once.

Nothing here imports torch, since files are counted in helper processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from vpl_lightning.archives.parallel import process_files
from vpl_lightning.artifacts import read_clip_es, read_mask
from vpl_lightning.errors import DataError
from vpl_lightning.functional.labels import VOID

Void = Literal["refuse", "background", "ignore"]
"""What predicted void counts as where the truth has a class."""
POWERS = tuple(float(power) for power in range(1, 11))
"""Powers of CLIP-ES's background score ``(1 - max map) ** power`` that ``eval_cam.py`` tries."""
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 13))
"""Constant background scores that ``eval_cam.py`` tries."""
BISECTIONS = 200
"""Halvings of [0, 1], beyond the last bit of float64."""


class Background(NamedTuple):
    """How the background competes with maps: it wins where the largest map is at most ``level``."""

    name: str
    level: float

    @classmethod
    def power(cls, power: float) -> Background:
        """Return the score ``(1 - m) ** power``; it falls with ``m``, so it wins below one level of ``m``."""
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 - middle) ** power >= middle else (low, middle)
        return cls(f"power {power:g}", high)

    @classmethod
    def threshold(cls, threshold: float) -> Background:
        """Return a constant score."""
        return cls(f"threshold {threshold:g}", threshold)


@dataclass(frozen=True)
class ScoreJob:
    """One image to score.

    Attributes:
        id: Its id.
        prediction: A mask, or CLIP-ES's maps.
        truth: Its true mask.
    """

    id: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class CountRules:
    """How pixels are counted.

    Attributes:
        num_classes: Classes, background included.
        void: What predicted void counts as.
        levels: Ascending levels of the background for maps; empty for masks.
        field: Which maps of a CLIP-ES file.
    """

    num_classes: int
    void: Void = "refuse"
    levels: tuple[float, ...] = ()
    field: str = "attn_highres"


class Counts(NamedTuple):
    """Occupied cells of a (bin, truth, prediction) table of one image."""

    cells: Int64[np.ndarray, " cells"]
    pixels: Int64[np.ndarray, " cells"]


def count_masks(
    jobs: Sequence[ScoreJob], rules: CountRules, *, workers: int | None
) -> Int64[np.ndarray, "C C"]:
    """Return the confusion matrix of masks; rows are the truth.

    Raises:
        DataError: If a file is missing or wrong, or sizes differ; names it.
    """
    matrix: Int64[np.ndarray, "C C"] = _accumulate(jobs, rules, bins=1, workers=workers)[0]
    return matrix


def count_maps(
    jobs: Sequence[ScoreJob],
    rules: CountRules,
    backgrounds: Sequence[Background],
    *,
    workers: int | None,
) -> Int64[np.ndarray, "S C C"]:
    """Return the confusion matrices of maps, one a background score, from one pass over the files.

    A pixel's class is that of its largest map, and background where the background score is at least as
    large. Every score of :class:`Background` is a level of the largest map, so that the table (truth, largest
    map's class, level bin) holds all of them.

    Raises:
        DataError: If a file is missing or wrong, or sizes differ; names it.
    """
    order = np.argsort([background.level for background in backgrounds], kind="stable")
    levels = tuple(backgrounds[int(index)].level for index in order)
    rules = CountRules(rules.num_classes, rules.void, levels, rules.field)
    table = _accumulate(jobs, rules, bins=len(levels) + 1, workers=workers)
    matrices = np.zeros((len(levels), rules.num_classes, rules.num_classes), np.int64)
    for rank, index in enumerate(order):
        # Bins up to `rank` lie at or below this level: background takes them, whatever class had the largest
        # map.
        matrices[index] = table[rank + 1 :].sum(0)
        matrices[index, :, 0] += table[: rank + 1].sum((0, 2))
    return matrices


def _accumulate(
    jobs: Sequence[ScoreJob], rules: CountRules, *, bins: int, workers: int | None
) -> Int64[np.ndarray, "bins C C"]:
    table = np.zeros(bins * rules.num_classes**2, np.int64)
    count = partial(count_image, rules=rules)
    for cells, pixels in process_files(count, jobs, total=len(jobs), title="scoring", workers=workers):
        table[cells] += pixels
    return table.reshape(bins, rules.num_classes, rules.num_classes)


def count_image(job: ScoreJob, *, rules: CountRules) -> Counts:
    """Count the pixels of one image."""
    truth = read_mask(job.truth, num_classes=rules.num_classes)
    if rules.levels:
        labels, best = _largest_map(job, rules)
        bins = np.searchsorted(np.asarray(rules.levels), best.astype(np.float64), side="left")
    else:
        labels, bins = read_mask(job.prediction, num_classes=rules.num_classes), np.zeros(1, np.int64)
    if labels.shape != truth.shape:
        raise DataError(
            f"{job.prediction} has {labels.shape[0]} x {labels.shape[1]} pixels (H x W), its truth "
            f"{job.truth} {truth.shape[0]} x {truth.shape[1]}"
        )
    counted = truth != VOID
    predicted_void = counted & (labels == VOID)
    if predicted_void.any() and rules.void == "refuse":
        raise DataError(
            f"{job.prediction} leaves {int(predicted_void.sum())} pixels void where the truth has a class; "
            "set void to background or ignore"
        )
    if rules.void == "ignore":
        counted &= ~predicted_void
    guess = np.where(labels == VOID, 0, labels).astype(np.int64)
    bins = np.broadcast_to(bins, truth.shape)[counted]
    cells = (bins * rules.num_classes + truth[counted]) * rules.num_classes + guess[counted]
    found, pixels = np.unique(cells, return_counts=True)
    return Counts(found.astype(np.int64), pixels.astype(np.int64))


def _largest_map(
    job: ScoreJob, rules: CountRules
) -> tuple[UInt8[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
    keys, maps = read_clip_es(job.prediction, field=rules.field)
    if len(keys) and keys.max() + 1 >= rules.num_classes:
        raise DataError(
            f"{job.prediction} has a map of class {keys.max()}; there are {rules.num_classes - 1} classes"
        )
    if not len(keys):
        return np.zeros(maps.shape[1:], np.uint8), np.zeros(maps.shape[1:], np.float32)
    best = np.where(np.isnan(maps), 0, maps).astype(np.float32)
    return (keys[best.argmax(0)] + 1).astype(np.uint8), best.max(0)

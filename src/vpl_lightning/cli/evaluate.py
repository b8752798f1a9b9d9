"""``vpl evaluate``: mIoU of a folder of masks or of CLIP-ES's maps against the truth."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vpl_lightning.archives.lists import read_ids
from vpl_lightning.artifacts import atomic_path, atomic_write
from vpl_lightning.cli.confusion_picture import draw_confusion
from vpl_lightning.cli.scoring import (
    POWERS,
    THRESHOLDS,
    Background,
    CountRules,
    ScoreJob,
    Void,
    count_maps,
    count_masks,
)
from vpl_lightning.clip import class_set
from vpl_lightning.errors import ConfigurationError, DataError

ABSENT_RULE = "classes without a true pixel have no IoU and are left out of the mean (CLIP-ES's rule)"
TUNED = "tuned on the truth: the best of the sweep, chosen with the masks that score it; not a fair score"
NAMES_SHOWN = 20
"""Missing files that an error message spells out."""


@dataclass(frozen=True)
class Score:
    """The outcome under one background score.

    Attributes:
        background: Its name; empty for masks.
        matrix: Confusion matrix, rows are the truth.
    """

    background: str
    matrix: Int64[np.ndarray, "C C"]

    @property
    def iou(self) -> list[float | None]:
        """IoU of each class, background first; None for a class without a true pixel."""
        from torch import from_numpy

        from vpl_lightning.functional.confusion import iou

        values = iou(from_numpy(self.matrix)).tolist()
        return [None if np.isnan(value) else value for value in values]

    @property
    def miou(self) -> float:
        """Mean over the classes that have an IoU."""
        values = [value for value in self.iou if value is not None]
        if not values:
            raise DataError("the truth has no scored pixel: every pixel is void")
        return float(np.mean(values))


def evaluate(
    masks: str,
    *,
    against: str,
    classes: str = "voc",
    num_classes: int | None = None,
    ids: str | None = None,
    void: Void = "refuse",
    power: float = 1.0,
    powers: Sequence[float] = POWERS,
    thresholds: Sequence[float] = THRESHOLDS,
    field: str = "attn_highres",
    out: str | None = None,
    workers: int | None = None,
) -> int:
    """Score masks or maps: one confusion matrix over all pixels of all images, 255 in the truth left out.

    Maps become labels as in CLIP-ES: the largest map wins where it exceeds the background score
    ``(1 - max map) ** power``. The score at ``power`` needs no truth; the sweep shows what tuning on the
    truth gives.

    Args:
        masks: Folder of ``<id>.png`` masks, or of CLIP-ES's ``<id>.npy`` maps.
        against: Folder of true masks ``<id>.png``.
        classes: Class set: its names, and its number of classes (21 for VOC, 81 for COCO).
        num_classes: Classes with the background, if they have no names.
        ids: List of the images that must be scored; without it, those in ``masks``.
        void: Predicted 255 where the truth has a class: refuse, count as background, or leave out.
        power: Background power that is the score of maps.
        powers: Background powers of the sweep.
        thresholds: Constant background scores of the sweep.
        field: Which maps of a CLIP-ES file: ``attn_highres``, or ``highres`` for the unrefined ones.
        out: Folder that gets scores.json, scores.csv and confusion.png.
        workers: Processes; one a core by default.

    Returns:
        0; what cannot be scored raises.

    Raises:
        ConfigurationError: If a folder is missing or holds nothing to score.
        DataError: If a file is missing or wrong; names it.
    """
    names = _class_names(classes, num_classes)
    jobs, suffix = _find_jobs(Path(masks), Path(against), ids)
    rules = CountRules(len(names), void, field=field)
    if suffix == ".png":
        scores = [Score("", count_masks(jobs, rules, workers=workers))]
    else:
        backgrounds = _backgrounds(power, powers, thresholds)
        matrices = count_maps(jobs, rules, backgrounds, workers=workers)
        scores = [Score(b.name, matrix) for b, matrix in zip(backgrounds, matrices, strict=True)]
    print("\n".join(_table(scores, names, images=len(jobs))), flush=True)
    if out:
        _write(Path(out), scores, names, {"masks": masks, "against": against, "images": len(jobs)})
    return 0


def _class_names(classes: str, num_classes: int | None) -> list[str]:
    names = ["background", *class_set(classes).foreground]
    if num_classes is None or num_classes == len(names):
        return names
    if not 2 <= num_classes <= 255:
        raise ConfigurationError(f"num_classes={num_classes} must lie between 2 and 255")
    return ["background", *(f"class {number}" for number in range(1, num_classes))]


def _backgrounds(power: float, powers: Sequence[float], thresholds: Sequence[float]) -> list[Background]:
    """Return the truth-free score first, then the sweep."""
    if min([power, *powers]) <= 0:
        raise ConfigurationError(f"power={power}, powers={list(powers)}: powers must be positive")
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise ConfigurationError(f"thresholds={list(thresholds)} must lie in [0, 1)")
    sweep = dict.fromkeys([power, *powers])
    return [Background.power(value) for value in sweep] + [Background.threshold(t) for t in thresholds]


def _find_jobs(masks: Path, against: Path, ids: str | None) -> tuple[list[ScoreJob], str]:
    for key, folder in (("masks", masks), ("against", against)):
        if not folder.is_dir():
            raise ConfigurationError(f"{key}='{folder}' is no folder")
    found = {suffix: sorted(path.stem for path in masks.glob(f"*{suffix}")) for suffix in (".png", ".npy")}
    suffixes = [suffix for suffix, names in found.items() if names]
    if len(suffixes) != 1:
        what = "both .png and .npy files" if suffixes else "neither .png nor .npy files"
        raise ConfigurationError(f"masks='{masks}' holds {what}; give a folder of one kind")
    suffix = suffixes[0]
    names = read_ids(Path(ids)) if ids else found[suffix]
    present = set(found[suffix])
    _require([masks / f"{name}{suffix}" for name in names if name not in present], "nothing to score")
    jobs = [ScoreJob(name, masks / f"{name}{suffix}", against / f"{name}.png") for name in names]
    _require([job.truth for job in jobs if not job.truth.is_file()], "no truth")
    others = sum(1 for path in against.glob("*.png")) - len(jobs)
    if others and not ids:
        rest = f"{others:,} further truths have no prediction"
        print(f"{len(jobs):,} images scored; {rest} (--ids requires those of a list)")
    return jobs, suffix


def _require(missing: Sequence[Path], what: str) -> None:
    if missing:
        listed = ", ".join(map(str, missing[:NAMES_SHOWN]))
        rest = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        raise DataError(f"{what} for {len(missing)} images: {listed}{rest} missing")


def _table(scores: Sequence[Score], names: Sequence[str], *, images: int) -> list[str]:
    score = scores[0]
    width = max(map(len, names))
    lines = [f"{'class':<{width}}  IoU"]
    for name, value in zip(names, score.iou, strict=True):
        lines.append(f"{name:<{width}}  " + ("absent" if value is None else f"{100 * value:6.2f}"))
    counted = sum(value is not None for value in score.iou)
    lines.append(f"mIoU {100 * score.miou:.2f} over {counted} classes, {images:,} images; {ABSENT_RULE}")
    if len(scores) > 1:
        best = max(scores, key=lambda item: item.miou)
        lines += [f"background: {score.background}, chosen without the truth", "", "sweep of the background:"]
        lines += [f"  {item.background:<15} {100 * item.miou:6.2f}" for item in scores]
        lines.append(f"best: {best.background}, mIoU {100 * best.miou:.2f} ({TUNED})")
    return lines


def _write(folder: Path, scores: Sequence[Score], names: Sequence[str], about: dict[str, Any]) -> None:
    score = scores[0]
    content = {
        **about,
        "miou": score.miou,
        "absent_rule": ABSENT_RULE,
        "iou": dict(zip(names, score.iou, strict=True)),
        "confusion": score.matrix.tolist(),
    }
    if len(scores) > 1:
        best = max(scores, key=lambda item: item.miou)
        content["background"] = score.background
        content["sweep"] = {item.background: item.miou for item in scores}
        content["tuned_on_truth"] = {"background": best.background, "miou": best.miou, "note": TUNED}
    atomic_write(folder / "scores.json", (json.dumps(content, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "iou", "true_pixels", "predicted_pixels", "correct_pixels"])
    for number, (name, value) in enumerate(zip(names, score.iou, strict=True)):
        row, column = score.matrix[number].sum(), score.matrix[:, number].sum()
        writer.writerow([name, "" if value is None else value, row, column, score.matrix[number, number]])
    writer.writerow(["mean", score.miou, score.matrix.sum(), score.matrix.sum(), score.matrix.trace()])
    atomic_write(folder / "scores.csv", text.getvalue().encode())
    with atomic_path(folder / "confusion.png") as partial:
        draw_confusion(score.matrix, names).save(partial, format="PNG")

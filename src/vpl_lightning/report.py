"""The end of a run: one table of text against vision prototypes, and one picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from vpl_lightning.artifacts import atomic_path, atomic_write
from vpl_lightning.data import Sample, SegmentationDataModule
from vpl_lightning.figures import heat_overlay, mask_overlay, sheet
from vpl_lightning.functional.confusion import mean_iou
from vpl_lightning.masks import make_mask
from vpl_lightning.structures import ImageArray
from vpl_lightning.tasks import DecoderModule

PICTURES = 6
"""Rows of the picture."""
TITLES = ("image", "text map", "vision map", "pseudo-mask", "prediction", "truth")
ROWS = {
    "raw": "raw map mIoU",
    "refined": "refined map mIoU",
    "mask": "pseudo-mask mIoU",
    "gap": "gap (centroids)",
    "gap_cos": "gap (cosines)",
}
"""Scores of the localiser and their names; mIoU in percent."""


def write_report(model: DecoderModule, datamodule: SegmentationDataModule, root: Path) -> str:
    """Write ``report.json`` and ``overview.png`` into the run folder and return the table.

    Args:
        model: Fitted; its localiser has been validated, and so has it.
        datamodule: With truth for its validation split.
        root: The run folder.
    """
    scores = model.localiser.score_table
    matrix = model.results.get("val")
    decoder = None if matrix is None else mean_iou(matrix)
    content = {**scores, "decoder": {"miou": decoder}, "images": len(datamodule.evaluation_dataset("val"))}
    atomic_write(root / "report.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    draw_overview(model, datamodule, root / "overview.png")
    return score_lines(scores, decoder)


def score_lines(scores: dict[str, dict[str, float]], decoder: float | None) -> str:
    """Lay the scores out as text."""
    lines = [f"{'':<20} {'text':>8} {'vision':>8} {'change':>8}"]
    for key, name in ROWS.items():
        if key in scores["text"]:
            factor, digits = (1, 3) if key.startswith("gap") else (100, 2)
            text, vision = (factor * scores[kind][key] for kind in ("text", "vision"))
            lines.append(f"{name:<20} {text:8.{digits}f} {vision:8.{digits}f} {vision - text:+8.{digits}f}")
    if decoder is not None:
        lines.append(f"{'decoder mIoU':<20} {'':>8} {100 * decoder:8.2f}")
    return "\n".join(lines)


def draw_overview(model: DecoderModule, datamodule: SegmentationDataModule, path: Path) -> None:
    """Draw some validation images with their maps, pseudo-mask, prediction and truth."""
    images = datamodule.evaluation_dataset("val")
    step = max(1, len(images) // PICTURES)
    tagged = [row for row in range(0, len(images), step) if images.labels(row)]
    rows = [_row(model, images[row]) for row in tagged[:PICTURES]]
    with atomic_path(path) as beside:
        sheet(rows, TITLES).save(beside, format="PNG")


@torch.no_grad()
def _row(model: DecoderModule, sample: Sample) -> list[ImageArray]:
    localiser, image = model.localiser, sample["image"]
    with localiser.using("text") as generator:
        text = generator.generate(image, sample["labels"]).cpu()
    with localiser.using("vision") as generator:
        vision = generator.generate(image, sample["labels"]).cpu()
    pseudo = make_mask(image, vision.affinity.numpy(), vision.classes.numpy(), localiser.masks)
    prediction, _ = model.segment(image)
    truth = np.zeros_like(prediction) if sample["mask"] is None else sample["mask"]
    return [
        image,
        heat_overlay(image, text.refined[0].numpy()),
        heat_overlay(image, vision.refined[0].numpy()),
        mask_overlay(image, pseudo),
        mask_overlay(image, prediction),
        mask_overlay(image, truth),
    ]

"""The comparison of prototypes: its table, and what it computes on a random CLIP and drawn scenes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import prototypes
from command_line import command


def test_the_summary_counts_wins_in_the_direction_that_is_better():
    tables = [
        {"text": {"raw": 20.0, "gap": 1.0}, "ours": {"raw": 22.0, "gap": 0.8}},
        {"text": {"raw": 21.0, "gap": 1.0}, "ours": {"raw": 20.0, "gap": 0.9}},
    ]
    last = prototypes.summary(tables).splitlines()[-1]
    assert last == "| ours | 21.0 ± 1.4 (1/2) | 0.85 ± 0.07 (2/2) |"


def test_the_command_holds_no_folders():
    arguments = ["/somewhere/prototypes.py", "photos", "--root", "/data/VOC2012", "--pixels", "9"]
    assert command(arguments) == "python benchmarks/prototypes.py photos --root VOC2012 --pixels 9"


def test_presets_differ_in_the_cap_alone():
    recipe = prototypes.capped("paper", 7)
    assert recipe.targets.max_pixels_per_image == 7
    assert recipe.objective.tau_image == pytest.approx(0.03)


def test_equal_rows_score_equally_and_every_row_is_scored(tiny_encoder):
    from vpl_lightning import baselines
    from vpl_lightning.data import ShapesDataModule

    data = ShapesDataModule(train_images=1, val_images=1, test_images=3)
    generator = baselines.create("clip_es", encoder=tiny_encoder, classes=data.classes)
    text = generator.text_prototypes
    other = F.normalize(torch.randn(text.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = [
        prototypes.Row(name, rows, 30.0) for name, rows in (("text", text), ("same", text), ("other", other))
    ]
    table = prototypes.score(generator, rows, data.evaluation_dataset("test"), masks=False)
    assert table["text"] == table["same"]
    assert table["other"]["gap"] != table["text"]["gap"]
    assert set(table["text"]) == {"raw", "refined", "gap"}

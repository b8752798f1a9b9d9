"""The whole method through the command line: products, reuse, rebuilding, ranks, interruption."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.runs import SMALL, command, environment, vpl
from vpl_lightning.artifacts import read_prototypes


def masks(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "pseudo_masks").glob("*.png"))}


def test_leaves_every_product(finished_run: Path) -> None:
    prototypes, metadata = read_prototypes(finished_run / "prototypes.safetensors")
    torch.testing.assert_close(prototypes.norm(dim=-1), torch.ones(len(prototypes)))
    assert metadata["classes"].splitlines()[0] == "train"
    assert len(masks(finished_run)) == 24
    with Image.open(next((finished_run / "pseudo_masks").glob("*.png"))) as mask:
        assert mask.mode == "P"
        assert mask.size == (112, 112)
        assert set(np.unique(np.asarray(mask))) <= {*range(11), 255}
    report = json.loads((finished_run / "report.json").read_text())
    assert set(report["text"]) == set(report["vision"]) == {"raw", "refined", "gap", "gap_cos"}
    assert report["decoder"]["miou"] is not None
    with Image.open(finished_run / "overview.png") as picture:
        assert picture.size == (6 * 164 + 4, 6 * 164 + 4 + 16)  # six scenes, six columns
    assert "refined map mIoU" in (finished_run / "stdout.txt").read_text()


def test_checkpoints_hold_no_encoder(finished_run: Path) -> None:
    (path,) = finished_run.glob("decoder/checkpoints/last.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert any(key.startswith("decoder.") for key in weights)
    assert not any("encoder" in key for key in weights)


def test_reuses_what_is_valid_and_says_why_it_rebuilds(finished_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished_run, root)
    again = vpl("fit", *SMALL, f"--trainer.default_root_dir={root}")
    assert again.returncode == 0, again.stderr
    assert "prototypes: reusing" in again.stdout
    assert "pseudo-masks: reusing" in again.stdout
    changed = vpl(
        "fit", *SMALL, f"--trainer.default_root_dir={root}", "--model.localiser.recipe.targets.mode=avg"
    )
    assert changed.returncode == 0, changed.stderr
    assert "targets.mode changed from 'prod' to 'avg'" in changed.stdout
    assert "prototypes changed" in changed.stdout


def test_scores_and_predicts_from_the_latest_checkpoint(finished_run: Path) -> None:
    tested = vpl("test", *SMALL, f"--trainer.default_root_dir={finished_run}")
    assert tested.returncode == 0, tested.stderr
    assert "mean" in tested.stdout
    predicted = vpl("predict", *SMALL, f"--trainer.default_root_dir={finished_run}")
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((finished_run / "predictions").rglob("val_*.png"))) == 6


def test_two_ranks_give_the_same_products_as_one(finished_run: Path, tmp_path: Path) -> None:
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp")
    result = vpl("fit", *SMALL, *ranks, f"--trainer.default_root_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    alone = read_prototypes(finished_run / "prototypes.safetensors").prototypes
    together = read_prototypes(tmp_path / "prototypes.safetensors").prototypes
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    one = json.loads((finished_run / "report.json").read_text())["text"]
    two = json.loads((tmp_path / "report.json").read_text())["text"]
    assert two["raw"] == one["raw"]
    assert two["refined"] == one["refined"]
    assert set(masks(tmp_path)) == set(masks(finished_run))


@pytest.mark.parametrize("seed", range(3))
def test_goes_on_after_sigkill_to_the_same_bytes(finished_run: Path, tmp_path: Path, seed: int) -> None:
    words = command("fit", *SMALL, f"--trainer.default_root_dir={tmp_path}")
    with subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        started = time.monotonic()
        wanted = random.Random(seed).choice(
            ["features/*.safetensors", "prototypes.safetensors", "pseudo_masks/*.png"]
        )
        while not list(tmp_path.glob(wanted)) and time.monotonic() - started < 120:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    resumed = vpl("fit", *SMALL, f"--trainer.default_root_dir={tmp_path}")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "prototypes.safetensors").read_bytes() == (
        finished_run / "prototypes.safetensors"
    ).read_bytes()
    assert masks(tmp_path) == masks(finished_run)

"""A generator in a package of its own, installed with pip, is listed and runs phase 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "a_strangers_generator"
version = "1.0"
[project.entry-points."vpl_lightning.baselines"]
strange = "strange:Strange"
unfinished = "strange.missing:Nothing"
[tool.setuptools]
py-modules = ["strange"]
"""
MODULE = '''
import torch
from vpl_lightning import BaselineInfo, CAMGenerator
from vpl_lightning.structures import ClassCAMs

class Strange(CAMGenerator):
    """Cosines to dense features, centred by what it saw of the data set."""

    info = BaselineInfo(paper="A Strange Paper", origin="elsewhere", licence="Apache-2.0")
    needs_fit = True

    def __init__(self, encoder, classes, *, power=1.0):
        super().__init__(encoder, classes)
        self.power = power
        self.seen = {}
        self.centre = torch.zeros(encoder.joint_width)

    def observe(self, keys, images, encoded, labels):
        for key, rows in zip(keys, self.encoder.dense(encoded, "value")):
            self.seen[key] = rows.mean(0)

    def bank_state(self):
        return {"means": torch.stack([self.seen[key] for key in sorted(self.seen)])}

    def fit(self, states):
        self.centre = torch.cat([state["means"] for state in states]).mean(0)

    @torch.no_grad()
    def localise(self, images, encoded, labels):
        maps = []
        for image, rows, ids in zip(images, self.encoder.dense(encoded, "value"), labels):
            scores = (self.prototypes[ids] @ (rows - self.centre).T).reshape(-1, *encoded.grid)
            low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
            cams = ((scores - low) / (high - low)) ** self.power
            maps.append(ClassCAMs(ids, cams, cams, tuple(image.shape[:2])))
        return maps
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the stranger's package is installed."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "strange.py").write_text(MODULE)
    target = folder / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(folder)],
        check=True,
        capture_output=True,
    )
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def vpl(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vpl_lightning", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_listed_and_its_broken_sibling_named(environment: dict[str, str]) -> None:
    done = vpl(environment, "baselines")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("strange"))
    assert line.split("  ")[-1].strip() == "Apache-2.0"
    assert "A Strange Paper" in line
    assert "clip_es" in done.stdout
    assert "skipped 'unfinished'" in done.stderr
    assert "unfinished" not in done.stdout


def test_it_runs_phase_1(environment: dict[str, str], tmp_path: Path) -> None:
    config = {
        "model": {
            "class_path": "VisionPrototypeModule",
            "init_args": {
                "generator": {"name": "strange", "options": {"power": 2.0}},
                "recipe": {"solver": {"steps": 3}},
            },
        },
        "data": {"class_path": "ShapesDataModule", "init_args": {"train_images": 6, "val_images": 2}},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = vpl(environment, "fit", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "prototypes.safetensors").is_file()
    assert (tmp_path / "run" / "bank.safetensors").is_file()
    manifest = json.loads((tmp_path / "run" / "prototypes" / "manifest.json").read_text())
    assert manifest["settings"]["generator"] == {
        "name": "strange",
        "options": {"power": 2.0},
        "templates": None,
    }

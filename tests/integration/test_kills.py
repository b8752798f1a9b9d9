"""Phase 1 and the mask stage, killed at random moments, leave nothing half-written and go on to the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from PIL import Image
from safetensors.torch import load_file

from vpl_lightning.data import ShapesDataModule
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig
from vpl_lightning.method import fit_method, prepare_masks, stage_trainer
from vpl_lightning.tasks import VisionPrototypeModule

KILLS = int(os.environ.get("VPL_TEST_KILLS", "2"))
"""Of each stage; ``VPL_TEST_KILLS=20`` for a thorough run."""
PRODUCTS = {"prototypes": "prototypes.safetensors", "pseudo_masks": "pseudo_masks/*.png"}


def quiet_trainer(**options: object) -> Trainer:
    return Trainer(accelerator="cpu", enable_progress_bar=False, use_distributed_sampler=False, **options)


def run(stage: str, root: Path) -> None:
    torch.set_num_threads(1)
    recipe = PrototypeRecipe(solver=SolverConfig(steps=120))
    localiser = VisionPrototypeModule(recipe=recipe, block_size=4, batch_size=4, mask_workers=2)
    data = ShapesDataModule(train_images=20)
    if stage == "prototypes":
        trainer = stage_trainer(quiet_trainer, root, stage)
        fit_method(localiser, data, trainer, new_trainer=quiet_trainer)
    else:
        prepare_masks(localiser, data, root, new_trainer=quiet_trainer)


@pytest.fixture(scope="module")
def start() -> Callable[[str, Path], ForkServerProcess]:
    """Starts a stage in a process of its own that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "scipy.ndimage", "pydensecrf.densecrf"])

    def begin(stage: str, root: Path) -> ForkServerProcess:
        process = context.Process(target=run, args=(stage, root))
        process.start()
        return process

    return begin


def products(stage: str, root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob(PRODUCTS[stage])}


def read_everything(root: Path) -> None:
    """Fails on a file that is not whole."""
    readers = {
        ".png": lambda path: Image.open(path).load(),
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
        ".ckpt": lambda path: torch.load(path, weights_only=True),
    }
    for path in root.rglob("*.*"):
        if path.suffix in readers:
            readers[path.suffix](path)


@pytest.mark.parametrize("stage", PRODUCTS)
def test_killed_at_random_moments(start, tmp_path: Path, stage: str) -> None:
    before, whole = tmp_path / "before", tmp_path / "whole"
    before.mkdir()
    if stage == "pseudo_masks":
        start("prototypes", before).join()
    shutil.copytree(before, whole)
    began = time.monotonic()
    start(stage, whole).join()
    seconds = time.monotonic() - began
    expected = products(stage, whole)
    assert len(expected) == {"prototypes": 1, "pseudo_masks": 20}[stage]

    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        root = tmp_path / f"run {runs}"
        shutil.copytree(before, root)
        runs += 1
        process = start(stage, root)
        while kills < KILLS:
            process.join(moments.uniform(0, seconds))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            read_everything(root)
            process = start(stage, root)
        process.join()
        assert process.exitcode == 0
        assert products(stage, root) == expected
        assert not list(root.rglob("*.tmp*"))


def test_killed_between_the_last_step_and_the_product(start, tmp_path: Path) -> None:
    start("prototypes", tmp_path).join()
    expected = products("prototypes", tmp_path)
    (tmp_path / PRODUCTS["prototypes"]).unlink()
    start("prototypes", tmp_path).join()
    assert expected
    assert products("prototypes", tmp_path) == expected

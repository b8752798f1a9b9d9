"""Calls of the ``vpl`` command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SHAPES = PROJECT / "configs" / "shapes.yaml"
SMALL = (
    f"--config={SHAPES}",
    "--data.train_images=24",
    "--data.val_images=6",
    "--data.test_images=5",
    "--trainer.max_epochs=1",
    "--model.localiser.recipe.solver.steps=20",
    "--model.localiser.block_size=6",
    "--model.localiser.mask_workers=0",
    "--model.localiser.score_masks=false",
)
"""The shapes configuration, cut down to seconds."""


def command(*words: str) -> list[str]:
    """Return the command line of ``vpl``."""
    return [sys.executable, "-m", "vpl_lightning", *words]


def environment() -> dict[str, str]:
    """Return an environment in which one process keeps to one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def vpl(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``vpl`` to its end."""
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment())

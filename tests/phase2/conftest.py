"""Fixtures of phase 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.phase2.standin import SquaresDataModule, module
from tests.trainers import trainer
from vpl_lightning.tasks import DecoderModule


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderModule, Path]:
    """A task after six steps, and its run folder with checkpoints."""
    root = tmp_path_factory.mktemp("run")
    task = module()
    keep = ModelCheckpoint(root / "checkpoints", monitor="val_miou", mode="max")
    run = trainer(root, max_epochs=2, limit_val_batches=1.0, callbacks=[keep], enable_checkpointing=True)
    run.fit(task, datamodule=SquaresDataModule())
    return task, root

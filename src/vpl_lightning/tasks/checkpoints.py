"""Which checkpoint of a run folder a task goes on from, and whether it may."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn

from vpl_lightning.errors import ConfigurationError

KEY = "vpl_lightning"
"""Entry of a checkpoint that holds its :data:`Record`."""
PATTERNS = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")
"""Where Lightning and its loggers leave checkpoints below a run folder."""

Record = Mapping[str, Any]
"""What a checkpoint says of itself: ``stage``, ``classes``, ``encoder``, ``settings``."""


class LatestCheckpoint(Checkpoint):
    """Keeps the latest state of a run in one file: every so many steps, and when training ends.

    Lightning's ``ModelCheckpoint`` does one of the two. A task brings this as a class of its own, so that
    Lightning does not take it for a replacement of the ``ModelCheckpoint`` that a user has configured.

    Args:
        path: The file.
        steps: Optimiser steps between two writings.
    """

    def __init__(self, path: str | Path, *, steps: int) -> None:
        self.path = Path(path)
        self.steps = steps
        self._written = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run begins."""
        self._written = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write after every so many steps."""
        if trainer.global_step - self._written >= self.steps:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last state, unless it is written already."""
        if trainer.global_step > self._written:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self._written = trainer.global_step
        trainer.save_checkpoint(self.path, False)  # the whole state, not the weights alone


def read_record(path: Path) -> Record | None:
    """Return the record of a checkpoint; None if the file is damaged or somebody else's."""
    checkpoint = _read(path)
    record = None if checkpoint is None else checkpoint.get(KEY)
    return record if isinstance(record, dict) else None


def run_checkpoints(trainer: Trainer, stage: str) -> list[Path]:
    """Return the readable checkpoints of a stage in a trainer's run folder, the latest first."""
    paths = sorted(
        set(_candidates(trainer)), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True
    )
    return [path for path in paths if (read_record(path) or {}).get("stage") == stage]


def best_checkpoint(paths: list[Path]) -> Path | None:
    """Return what a ``ModelCheckpoint`` with a monitor called its best, as the latest checkpoint tells."""
    for path in paths:
        for state in (_read(path) or {}).get("callbacks", {}).values():
            best = state.get("best_model_path") if isinstance(state, dict) and state.get("monitor") else None
            if best and Path(best).is_file():
                return Path(best)
    return None


def chosen_checkpoint(trainer: Trainer, stage: str, name: str) -> Path:
    """Return what ``--ckpt_path`` means: ``last`` and ``best`` of the run folder, or a file.

    Raises:
        ConfigurationError: If there is no such checkpoint; says where it was looked for.
    """
    if name in ("last", "best"):
        paths = run_checkpoints(trainer, stage)
        found = paths[0] if name == "last" and paths else best_checkpoint(paths)
        if found is None:
            raise ConfigurationError(
                f"ckpt_path='{name}': no such checkpoint of the stage '{stage}' below "
                f"{trainer.default_root_dir}; run 'vpl fit' first, or give the path of a file"
            )
        return found
    if not Path(name).is_file():
        raise ConfigurationError(f"ckpt_path='{name}' is no file; give a checkpoint, 'last' or 'best'")
    return Path(name)


def difference(found: Any, wanted: Any, key: str = "") -> str | None:
    """Return the first difference of nested records, as ``"a.b changed from 1 to 2"``, or None."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            inner = difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else str(name))
            if inner is not None:
                return inner
        return None
    return None if found == wanted else f"{key} changed from {found!r} to {wanted!r}"


def state_fingerprint(module: nn.Module) -> str:
    """Return a SHA-256 of a module's weights, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        return None
    return checkpoint if isinstance(checkpoint, dict) else None


def _candidates(trainer: Trainer) -> Iterator[Path]:
    for pattern in PATTERNS:
        yield from Path(trainer.default_root_dir).glob(pattern)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            yield from Path(callback.dirpath).glob("*.ckpt")

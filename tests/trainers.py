"""Lightning trainers for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer


def trainer(root: Path, **settings: Any) -> Trainer:
    """A silent trainer on one CPU process that writes nothing unless asked."""
    return Trainer(
        **{
            "default_root_dir": root,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "inference_mode": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            **settings,
        }
    )

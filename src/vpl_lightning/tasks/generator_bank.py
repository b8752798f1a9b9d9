"""The pass over the training images that some generators need before use, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpl_lightning.artifacts import atomic_write, fingerprint
from vpl_lightning.blocks import BlockPlan
from vpl_lightning.cams import CAMGenerator
from vpl_lightning.progress import progress
from vpl_lightning.tasks.gather import gather_list

BANK = "bank.safetensors"
"""Name of the file below a run folder."""
_KEY = "vpl_lightning"


def fit_generator(
    generator: CAMGenerator,
    plan: BlockPlan,
    path: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    num_workers: int = 0,
) -> None:
    """Fit a generator on the images of all processes, or with what an earlier run left of the same settings.

    Every process must call this. An interrupted pass starts again.

    Args:
        generator: With the prototypes and scale that it shall observe with.
        plan: This process's share.
        path: The file, written by the first process.
        settings: All that the outcome depends on.
        batch_size: At most so many images of equal grid at once.
        num_workers: Processes that decode images.
    """
    wanted = fingerprint(settings)
    state = read_bank(path, wanted)
    if state is not None:
        generator.fit([state])
        return
    blocks = plan.pending(set())
    loaded = plan.load(blocks, patch_size=generator.encoder.patch_size, num_workers=num_workers)
    for block in progress(loaded, total=len(blocks), what="support of the generator", shown=plan.rank == 0):
        generator.observe_images(
            [sample["id"] for sample in block.samples],
            [sample["image"] for sample in block.samples],
            [sample["labels"] for sample in block.samples],
            resized=block.resized,
            batch_size=batch_size,
        )
    generator.fit(gather_list([generator.bank_state()]))
    if plan.rank == 0:
        write_bank(path, generator.bank_state(), wanted)


def write_bank(path: Path, state: Mapping[str, Tensor], made_from: str) -> None:
    """Write what a generator noted, and the fingerprint of the settings behind it, whole or not at all."""
    from safetensors.torch import save

    tensors = {key: value.cpu().contiguous() for key, value in state.items()}
    atomic_write(path, save(tensors, metadata={_KEY: json.dumps({"fingerprint": made_from})}))


def read_bank(path: Path, wanted: str) -> dict[str, Tensor] | None:
    """Read what a generator noted; None if the file is missing, damaged or made from other settings."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if json.loads(file.metadata()[_KEY])["fingerprint"] != wanted:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None

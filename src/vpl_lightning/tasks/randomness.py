"""Random numbers that a resumed run draws again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block, and leave its state outside as it was.

    Lightning's checkpoints hold no state of random numbers: a run that goes on would draw other dropout
    masks than one that was never stopped. What is drawn here depends on the key alone.

    Args:
        key: Non-negative numbers, such as seed, epoch, batch and rank.
        device: Where the block computes.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield

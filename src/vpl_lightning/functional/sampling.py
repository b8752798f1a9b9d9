"""Random choices that depend on a seed and on what is chosen from, never on the order in which it is seen."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def pixel_priorities(key: str, count: int, *, seed: int) -> Int[Tensor, " Q"]:
    """Return reproducible random 62-bit numbers for the pixels of one image.

    Args:
        key: Identifies the image.
        count: Pixels.
        seed: Of the whole run.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.integers(0, 2**62, count, dtype=np.int64))


def keep_smallest(priorities: Int[Tensor, " Q"], count: int) -> Int[Tensor, " q"]:
    """Return the positions of the ``count`` smallest priorities in ascending order of position."""
    return priorities.argsort(stable=True)[:count].sort().values

"""Which process reads which image, when: no image twice, none lost, every order reproducible."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from vpl_lightning.data.checks import ranks


class UnpaddedDistributedSampler(Sampler[int]):
    """Deals rows out to ranks in turn, in order, without padding: ranks may differ by one row.

    torch's ``DistributedSampler`` repeats rows until every rank has equally many, which biases scores and
    writes files twice. For evaluation and prediction, whose loops do not talk to other ranks before their
    end.

    Args:
        length: Rows of the data set.
        rank: This process.
        world_size: All processes.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Count this rank's rows."""
        return len(self.rows)


def own_rows(length: int) -> UnpaddedDistributedSampler:
    """Return this process's share of the rows of a data set."""
    rank, world_size = ranks()
    return UnpaddedDistributedSampler(length, rank=rank, world_size=world_size)


class TrainingSampler(Sampler[int]):
    """Shuffled rows for training, equally many on every rank, a function of seed and epoch alone.

    It yields ``epoch * length + row``, so that a data set knows the epoch without sharing state with its
    workers. All ranks shuffle alike and take turns; the ``length % world_size`` rows at the end of an epoch's
    order are left out.

    Args:
        length: Rows of the data set.
        seed: Changes every order.
        rank: This process.
        world_size: All processes.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each."""
        if epoch != self.epoch:
            self.seek(epoch)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Choose where the next pass begins.

        Args:
            epoch: Its number.
            start: How many of this rank's rows an interrupted run has already used; for the next pass alone.
        """
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rest of the epoch."""
        word = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(word))
        order = torch.randperm(self.length, generator=generator)
        usable = self.length - self.length % self.world_size
        start, self.start = self.start, 0
        rows = order[self.rank : usable : self.world_size][
            start:
        ].numpy()  # a tensor would be taken apart at once
        return (int(row) + self.epoch * self.length for row in rows)

    def __len__(self) -> int:
        """Count this rank's rows in a whole epoch."""
        return self.length // self.world_size


def seed_worker(worker: int) -> None:
    """Seed the other generators of a worker as torch has seeded its own; keep OpenCV to one thread."""
    import cv2

    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (third-party transforms may use the legacy generator)
    cv2.setNumThreads(0)

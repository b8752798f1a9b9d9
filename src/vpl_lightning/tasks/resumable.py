"""A training loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from vpl_lightning.data import TrainingBatch, TrainingSampler
from vpl_lightning.errors import ConfigurationError


class ResumableLoader:
    """Wraps a loader of views so that its place in the order of training is part of Lightning's checkpoints.

    Lightning restarts a plain ``DataLoader`` at the beginning of the epoch, and with worker processes even at
    the beginning of the wrong one: it asks for an iterator before it sets the epoch. Here the order is looked
    up when the first batch is asked for.

    Args:
        loader: Batches by a :class:`TrainingSampler`.
    """

    def __init__(self, loader: DataLoader[TrainingBatch]) -> None:
        if not isinstance(loader.sampler, TrainingSampler) or loader.batch_size is None:
            raise ConfigurationError("a resumable loader needs batches in the order of a TrainingSampler")
        self.loader = loader
        self.batch_size = loader.batch_size
        self.sampler: TrainingSampler = loader.sampler
        """Lightning tells it the epoch."""
        self.used = 0
        """Batches of the epoch that were handed out, by earlier runs too."""

    def __len__(self) -> int:
        """Count the batches of a whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Iterate over the rest of the epoch."""
        self.used = self.sampler.start // self.batch_size
        for batch in self.loader:
            self.used += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of training."""
        return {"epoch": self.sampler.epoch, "used": self.used}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place in the order of training."""
        epoch, used = int(state_dict["epoch"]), int(state_dict["used"])
        if used >= len(self):
            epoch, used = epoch + 1, 0
        self.sampler.seek(epoch, used * self.batch_size)

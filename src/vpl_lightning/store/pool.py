"""A bounded pool of samples for streams of unknown length: a random subset, whatever the order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.statistics import Statistics
from vpl_lightning.functional.sweep import PixelChunk
from vpl_lightning.functional.targets import Selected
from vpl_lightning.store.samples import LabelledChunk, SampleSource, owners, rows_a_chunk, runs

SLACK = 1.25
"""Samples for which there is room, over those that are kept: how rarely the pool has to be thinned out."""
FREE = -1


class _Image(NamedTuple):
    key: str
    allowed: Tensor


class SamplePool(SampleSource):
    """Keeps the samples with the smallest priorities, at most ``max_samples`` of all that are added.

    Priorities come with the samples and depend on a seed and the image alone, so that the pool ends up with
    the same samples in the same order, in whatever order images are added.

    Args:
        max_samples: How many are kept; ``2 D + 4 R + 20`` bytes each, with a quarter more room.
        rows: ``R``, rows of prototypes.
        width: ``D``.
        folder: Keep features and targets in nameless files there, which vanish with the process, instead of in
            memory.

    Raises:
        ConfigurationError: If no sample may be kept.
    """

    def __init__(self, max_samples: int, *, rows: int, width: int, folder: str | Path | None = None) -> None:
        if max_samples < 1:
            raise ConfigurationError(f"max_pixels={max_samples} must be at least 1")
        self.max_samples = max_samples
        self.rows = rows
        self.width = width
        self._folder = None if folder is None else Path(folder)
        room = int(max_samples * SLACK) + 1
        self._features = self._array((room, width), np.float16)
        self._targets = self._array((room, rows), np.float32)
        self._weights = np.zeros(room, np.float32)
        self._priorities = np.zeros(room, np.int64)
        self._positions = np.zeros(room, np.int32)
        self._owners = np.full(room, FREE, np.int32)
        self._images: list[_Image] = []
        self.class_weights: Float[Tensor, " R"] | None = None
        """Factor of a sample's weight by its largest target, applied when samples are read."""

    def _array(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        if self._folder is None:
            return np.empty(shape, dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return np.memmap(file, dtype, mode="w+", shape=shape)

    def __len__(self) -> int:
        """Samples in the pool; up to the slack, a few more than are kept in the end."""
        return int((self._owners != FREE).sum())

    def add(self, key: str, samples: Selected, *, positions: Int[Tensor, " Q"] | None = None) -> None:
        """Add the samples of one image.

        Args:
            key: Identifies the image; images are read in order of their keys.
            samples: What :func:`select_pixels` gave.
            positions: Order of the samples within the image, if some were left out before.
        """
        count = len(samples.features)
        if positions is None:
            positions = torch.arange(count)
        self._images.append(_Image(key, samples.allowed.cpu()))
        start = 0
        while start < count:
            free = (self._owners == FREE).nonzero()[0]
            if not len(free):
                self._thin_out()
                continue
            stop = min(start + len(free), count)
            slots, rows = free[: stop - start], slice(start, stop)
            self._features[slots] = samples.features[rows].half().cpu().numpy()
            self._targets[slots] = samples.targets[rows].float().cpu().numpy()
            self._weights[slots] = samples.weights[rows].float().cpu().numpy()
            self._priorities[slots] = samples.priorities[rows].cpu().numpy()
            self._positions[slots] = positions[rows].cpu().numpy()
            self._owners[slots] = len(self._images) - 1
            start = stop

    def _thin_out(self) -> None:
        """Leave the ``max_samples`` smallest priorities."""
        used = (self._owners != FREE).nonzero()[0]
        if len(used) > self.max_samples:
            order = np.argpartition(self._priorities[used], self.max_samples - 1)
            self._owners[used[order[self.max_samples :]]] = FREE

    def images(self) -> Iterator[tuple[str, Selected, Int[Tensor, " Q"]]]:
        """Read image by image, in order of keys.

        Yields:
            Key, samples, and their positions in the image.
        """
        for image, slots in self._slots():
            samples = Selected(
                torch.from_numpy(self._features[slots]),
                torch.from_numpy(self._targets[slots]),
                self._weigh(slots),
                image.allowed,
                torch.from_numpy(self._priorities[slots]),
            )
            yield image.key, samples, torch.from_numpy(self._positions[slots])

    @property
    def statistics(self) -> Statistics:
        """Sums over the samples."""
        total = Statistics.zeros(self.rows, self.width)
        for _, samples, _ in self.images():
            total = total + Statistics.of(samples)
        return total

    def chunks(self) -> Iterator[PixelChunk]:
        """Read every sample once."""
        return (chunk for chunk, _ in self._gather())

    def labelled_chunks(self) -> Iterator[LabelledChunk]:
        """Read every sample once with its target."""
        return (
            LabelledChunk(chunk, torch.from_numpy(self._targets[slots])) for chunk, slots in self._gather()
        )

    def _gather(self) -> Iterator[tuple[PixelChunk, Int[np.ndarray, " Q"]]]:
        images = list(self._slots())
        limit = rows_a_chunk(self.width, torch.device("cpu"))
        for span, _ in runs([len(slots) for _, slots in images], limit):
            group = images[span]
            slots = np.concatenate([part for _, part in group])
            allowed: Bool[Tensor, "images R"] = torch.stack([image.allowed for image, _ in group])
            yield (
                PixelChunk(
                    torch.from_numpy(self._features[slots]),
                    self._weigh(slots),
                    owners([len(part) for _, part in group]),
                    allowed,
                ),
                slots,
            )

    def _weigh(self, slots: Int[np.ndarray, " Q"]) -> Tensor:
        weights = torch.from_numpy(self._weights[slots])
        if self.class_weights is None:
            return weights
        return weights * self.class_weights[torch.from_numpy(self._targets[slots].argmax(-1))]

    def _slots(self) -> Iterator[tuple[_Image, Int[np.ndarray, " Q"]]]:
        self._thin_out()
        used = (self._owners != FREE).nonzero()[0]
        used = used[np.lexsort((self._positions[used], self._owners[used]))]
        present, starts = np.unique(self._owners[used], return_index=True)
        groups = zip(present, np.split(used, starts[1:]), strict=True) if len(present) else []
        found = [(self._images[owner], slots) for owner, slots in groups]
        yield from sorted(found, key=lambda pair: pair[0].key)

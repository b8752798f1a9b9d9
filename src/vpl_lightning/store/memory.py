"""Samples of phase 1 in memory, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from vpl_lightning.functional.statistics import Statistics
from vpl_lightning.functional.sweep import PixelChunk
from vpl_lightning.functional.targets import Selected
from vpl_lightning.store.samples import LabelledChunk, SampleSource, no_targets, owners, rows_a_chunk, runs


class MemorySamples(SampleSource):
    """Samples of phase 1 in memory; made by :meth:`of` or :meth:`copy`."""

    def __init__(
        self, statistics: Statistics, chunks: list[PixelChunk], targets: list[Tensor] | None = None
    ) -> None:
        self._statistics = statistics
        self._chunks = chunks
        self._targets = targets

    @classmethod
    def of(
        cls, images: Iterable[Selected], *, rows: int, width: int, keep_targets: bool = False
    ) -> MemorySamples:
        """Keep the samples of some images.

        Args:
            images: Their samples.
            rows: ``R``, rows of prototypes.
            width: ``D``.
            keep_targets: Also keep the targets (float16), which only ``targets.sinkhorn_rounds`` needs.
        """
        statistics = Statistics.zeros(rows, width)
        parts = []
        for image in images:
            statistics = statistics + Statistics.of(image)
            if len(image.features):
                parts.append(image)
        limit = rows_a_chunk(width, torch.device("cpu"))
        groups = [parts[span] for span, _ in runs([len(part.features) for part in parts], limit)]
        chunks = [
            PixelChunk(
                torch.cat([part.features for part in group]),
                torch.cat([part.weights for part in group]),
                owners([len(part.features) for part in group]),
                torch.stack([part.allowed for part in group]),
            )
            for group in groups
        ]
        targets = [torch.cat([part.targets for part in group]).half() for group in groups]
        return cls(statistics, chunks, targets if keep_targets else None)

    @classmethod
    def copy(cls, source: SampleSource, *, width: int, device: torch.device) -> MemorySamples:
        """Copy another source's samples to a device, in chunks that keep it busy; without targets.

        Args:
            source: Such as a :class:`FeatureStore`.
            width: ``D``.
            device: Where to; it must hold ``2 D + 4`` bytes a sample.
        """
        chunks: list[PixelChunk] = []
        group: list[PixelChunk] = []
        limit, count = rows_a_chunk(width, device), 0
        for chunk in source.chunks():
            if group and count + len(chunk.features) > limit:
                chunks.append(_join(group, device))
                group, count = [], 0
            group.append(_join([chunk], device))
            count += len(chunk.features)
        return cls(source.statistics, [*chunks, _join(group, device)] if group else chunks)

    @property
    def statistics(self) -> Statistics:
        """Sums over the samples."""
        return self._statistics

    def chunks(self) -> Iterator[PixelChunk]:
        """Read every sample once."""
        return iter(self._chunks)

    def labelled_chunks(self) -> Iterator[LabelledChunk]:
        """Read every sample once with its target.

        Raises:
            ConfigurationError: If targets were not kept.
        """
        if self._targets is None:
            raise no_targets()
        return (LabelledChunk(*pair) for pair in zip(self._chunks, self._targets, strict=True))


def _join(group: list[PixelChunk], device: torch.device) -> PixelChunk:
    starts = accumulate((len(chunk.allowed) for chunk in group[:-1]), initial=0)
    return PixelChunk(
        torch.cat([chunk.features for chunk in group]).to(device),
        torch.cat([chunk.weights for chunk in group]).to(device),
        torch.cat([chunk.images + start for chunk, start in zip(group, starts, strict=True)]).to(device),
        torch.cat([chunk.allowed for chunk in group]).to(device),
    )

"""Selected patches on disk: one half-precision shard a block of images, read back chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vpl_lightning.artifacts import Manifest, atomic_write, remove_leftovers
from vpl_lightning.errors import DataError
from vpl_lightning.functional.prototypes import PixelChunk, Statistics
from vpl_lightning.functional.targets import Selected

CACHE_BYTES = 1 << 30
"""Shards are kept in memory between passes while they fit into this many bytes."""
STATISTICS = "statistics."
"""Prefix of the sums in a shard."""


class BlockStore:
    """A folder of shards that were all made from the same settings.

    A shard holds what the images of one block contribute to phase 1: features in float16, weights, permissions, and
    the sums over targets that the objective needs. It is written whole or not at all, so that the store is the same
    to the byte whatever the number of ranks and interruptions.

    Args:
        folder: Where the shards are.
        settings: All that the features and targets depend on; shards of other settings are removed.
        clean: Whether this process may remove stale shards (one process does).
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, clean: bool = True) -> None:
        self.folder = Path(folder)
        if clean:
            self.folder.mkdir(parents=True, exist_ok=True)
            if Manifest.match_or_explain(self.folder, settings) is not None:
                for shard in self.folder.glob("block-*.safetensors"):
                    shard.unlink()
                Manifest(settings).write(self.folder)
            remove_leftovers(self.folder)

    def path(self, block: int) -> Path:
        """Return the file of one block."""
        return self.folder / f"block-{block:07d}.safetensors"

    def done(self) -> set[int]:
        """Return the blocks that are there."""
        return {int(path.stem.removeprefix("block-")) for path in self.folder.glob("block-*.safetensors")}

    def write(self, block: int, ids: Sequence[str], selected: Sequence[Selected]) -> None:
        """Write what the images of one block contribute, in their order."""
        first = selected[0]
        statistics = Statistics.zeros(first.targets.shape[1], first.features.shape[1])
        for one in selected:
            statistics = statistics + Statistics.of(one)
        counts = torch.tensor([len(one.features) for one in selected])
        tensors = {
            "features": torch.cat([one.features for one in selected]).half(),
            "weights": torch.cat([one.weights for one in selected]).float(),
            "images": torch.arange(len(selected)).repeat_interleave(counts),
            "allowed": torch.stack([one.allowed for one in selected]),
            **{STATISTICS + name: tensor for name, tensor in statistics.tensors().items()},
        }
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(self.path(block), save(content, metadata={"ids": json.dumps(list(ids))}))

    def chunk(self, block: int, device: torch.device | str = "cpu") -> PixelChunk:
        """Read the samples of one block."""
        read = self._read(block, ("features", "weights", "images", "allowed"), device)
        return PixelChunk(*read)

    def statistics(self, block: int) -> Statistics:
        """Read the sums of one block."""
        names = Statistics.zeros(1, 1).tensors()
        return Statistics(*self._read(block, [STATISTICS + name for name in names], "cpu"))

    def _read(self, block: int, names: Sequence[str], device: torch.device | str) -> list[Tensor]:
        try:
            with safe_open(str(self.path(block)), framework="pt", device=str(device)) as shard:
                return [shard.get_tensor(name) for name in names]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.path(block)}: unreadable ({error}); remove it to have it made again"
            ) from error


class StoredPixels:
    """Some blocks of a store, as the objective reads them; a chunk a block.

    Args:
        store: The folder.
        blocks: The blocks of this rank.
        device: Where the chunks are computed.
        cache_bytes: See :data:`CACHE_BYTES`.
    """

    def __init__(
        self,
        store: BlockStore,
        blocks: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.store = store
        self.blocks = list(blocks)
        self.device = torch.device(device)
        self._cache: dict[int, PixelChunk] = {}
        self._room = cache_bytes

    def statistics(self, *, rows: int, width: int) -> Statistics:
        """Sum the statistics of the blocks."""
        total = Statistics.zeros(rows, width)
        for block in self.blocks:
            total = total + self.store.statistics(block)
        return total

    def chunks(self) -> Iterator[PixelChunk]:
        """Iterate over the samples, in the order of blocks."""
        for block in self.blocks:
            chunk = self._cache.get(block)
            if chunk is None:
                chunk = self.store.chunk(block, self.device)
                size = sum(part.numel() * part.element_size() for part in chunk)
                if size <= self._room:
                    self._cache[block] = chunk
                    self._room -= size
            yield chunk

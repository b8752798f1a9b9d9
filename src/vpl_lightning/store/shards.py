"""Samples of phase 1 on disk: one file a block of images, mapped into memory a block at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpl_lightning.artifacts.atomic import atomic_write, remove_leftovers
from vpl_lightning.artifacts.fingerprint import Manifest, fingerprint
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.statistics import Statistics
from vpl_lightning.functional.sweep import PixelChunk
from vpl_lightning.functional.targets import Selected
from vpl_lightning.store.samples import LabelledChunk, SampleSource, no_targets, owners, rows_a_chunk, runs

FORMAT = "vpl_lightning.samples/2"
"""Identifies the layout of a shard."""

_ENTRY = "samples"
_NAME = re.compile(r"^(\d{8})\.safetensors$")
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "BOOL": np.bool_}


class _Shard(NamedTuple):
    """A finished file and where its tensors lie in it."""

    path: Path
    tensors: dict[str, tuple[type, tuple[int, ...], int]]
    """Type, shape and position of each."""
    ids: tuple[str, ...]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Map tensors; the mapping lives as long as they do."""
        data = np.memmap(self.path, np.uint8, mode="c")
        found = {}
        for name in names:
            dtype, shape, start = self.tensors[name]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found[name] = torch.from_numpy(data[start : start + size].view(dtype).reshape(shape))
        return found


class FeatureStore(SampleSource):
    """Samples of a data set in a folder, written and read by any number of ranks.

    A block is a fixed run of images; its file is written whole or not at all, and holds the same bytes
    whoever writes it and whenever. So an interrupted collection goes on with the blocks that are missing, and
    neither interruptions nor the number of ranks change the result. Features are float16; the sums that the
    objective needs of the targets lie beside them.

    Memory is bounded by one block: its file is mapped while it is read, then released.

    Args:
        folder: All ranks share it.
        settings: Whatever the samples depend on; files made from other settings count as missing.
        rows: ``R``, rows of prototypes.
        width: ``D``.
        rank: This process reads every ``world_size``-th block, from its rank on.
        world_size: Number of ranks.
        keep_targets: Also keep the targets (float16), which only ``targets.sinkhorn_rounds`` needs.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        rows: int,
        width: int,
        rank: int = 0,
        world_size: int = 1,
        keep_targets: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.rows = rows
        self.width = width
        self.rank = rank
        self.world_size = world_size
        self.keep_targets = keep_targets
        self.settings = {
            **settings,
            "format": FORMAT,
            "rows": rows,
            "width": width,
            "keep_targets": keep_targets,
        }
        self._fingerprint = fingerprint(self.settings)
        self._shards: dict[int, _Shard] = {}

    def prepare(self) -> str | None:
        """Make the folder, remove what was made from other settings or left half-written; for one rank alone.

        Returns:
            None if the samples there are reused, else why they are not.
        """
        reason = Manifest.match_or_explain(self.folder, self.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for path in self.folder.glob("*.safetensors"):
            if self._open(path) is None:
                path.unlink()
        if reason is not None:
            Manifest(self.settings).write(self.folder)
        return reason

    def finished(self) -> set[int]:
        """Return the blocks that are there, whoever wrote them."""
        for path in self.folder.glob("*.safetensors"):
            match = _NAME.match(path.name)
            if match and int(match[1]) not in self._shards:
                shard = self._open(path)
                if shard is not None:
                    self._shards[int(match[1])] = shard
        return set(self._shards)

    def ids(self) -> list[str]:
        """Return the ids of the images that are there, in order of blocks."""
        return [name for block in sorted(self.finished()) for name in self._shards[block].ids]

    def write(self, block: int, ids: Sequence[str], images: Sequence[Selected]) -> None:
        """Write the samples of one block, whole or not at all.

        Args:
            block: Its number; a file that is there already is replaced.
            ids: Of the block's images.
            images: Their samples, in the same order; images without any leave no trace but their id.

        Raises:
            ConfigurationError: If the samples are of another width or number of prototypes.
        """
        from safetensors.torch import save

        statistics = Statistics.zeros(self.rows, self.width)
        for image in images:
            if image.features.shape[1] != self.width or image.targets.shape[1] != self.rows:
                raise ConfigurationError(
                    f"samples of width {image.features.shape[1]} for {image.targets.shape[1]} prototypes "
                    f"do not fit the store's {self.width} and {self.rows}"
                )
            statistics = statistics + Statistics.of(image)
        parts = [image for image in images if len(image.features)]
        tensors = {
            "features": _cat([part.features.half() for part in parts], (0, self.width), torch.float16),
            "weights": _cat([part.weights.float() for part in parts], (0,), torch.float32),
            "sizes": torch.tensor([len(part.features) for part in parts], dtype=torch.int32),
            "allowed": _cat([part.allowed[None] for part in parts], (0, self.rows), torch.bool),
            **{f"statistics.{name}": value for name, value in statistics.tensors().items()},
        }
        if self.keep_targets:
            tensors["targets"] = _cat([part.targets.half() for part in parts], (0, self.rows), torch.float16)
        # One entry alone: the order of several would change from file to file.
        metadata = {_ENTRY: json.dumps({"fingerprint": self._fingerprint, "ids": list(ids)})}
        path = self.folder / f"{block:08d}.safetensors"
        atomic_write(path, save(tensors, metadata=metadata))
        self._shards.pop(block, None)

    @property
    def statistics(self) -> Statistics:
        """Sums over this rank's blocks."""
        total = Statistics.zeros(self.rows, self.width)
        names = [f"statistics.{part.name}" for part in fields(Statistics)]
        for shard in self._own():
            found = shard.read(names)
            total = total + Statistics(*(found[name].clone() for name in names))
        return total

    def chunks(self) -> Iterator[PixelChunk]:
        """Read every sample of this rank's blocks once."""
        for shard in self._own():
            yield from _cut(shard.read(["features", "weights", "sizes", "allowed"]), self.width)

    def labelled_chunks(self) -> Iterator[LabelledChunk]:
        """Read every sample of this rank's blocks once with its target.

        Raises:
            ConfigurationError: If targets were not kept.
        """
        if not self.keep_targets:
            raise no_targets()
        for shard in self._own():
            tensors = shard.read(["features", "weights", "sizes", "allowed", "targets"])
            start = 0
            for chunk in _cut(tensors, self.width):
                count = len(chunk.features)
                yield LabelledChunk(chunk, tensors["targets"][start : start + count])
                start += count

    def _own(self) -> list[_Shard]:
        blocks = sorted(self.finished())
        return [self._shards[block] for block in blocks if block % self.world_size == self.rank]

    def _open(self, path: Path) -> _Shard | None:
        """Read where the tensors of a file lie; None if it is not a whole file made from these settings."""
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            about = json.loads(header.pop("__metadata__")[_ENTRY])
            tensors = {
                name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            end = max(8 + length + entry["data_offsets"][1] for entry in header.values())
            matches = about["fingerprint"] == self._fingerprint and end == path.stat().st_size
            return _Shard(path, tensors, tuple(about["ids"])) if matches else None
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); check the disk or delete the file") from error


def _cut(tensors: dict[str, Tensor], width: int) -> Iterator[PixelChunk]:
    sizes = [int(size) for size in tensors["sizes"]]
    for images, rows in runs(sizes, rows_a_chunk(width, torch.device("cpu"))):
        yield PixelChunk(
            tensors["features"][rows],
            tensors["weights"][rows],
            owners(sizes[images]),
            tensors["allowed"][images],
        )


def _cat(parts: Sequence[Tensor], empty: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(empty, dtype=dtype)

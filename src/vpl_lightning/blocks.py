"""A data set cut into fixed runs of images: the unit of batching, of writing and of resuming.

Which images share a batch changes the last bits of their maps. A block always holds the same images, whatever the
number of ranks and wherever an earlier run was stopped, so that every product is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vpl_lightning.clip import resize_to_patches
from vpl_lightning.data import Sample, TaggedImages
from vpl_lightning.data.checks import ranks
from vpl_lightning.structures import ImageArray


class Block(NamedTuple):
    """Decoded images of one block."""

    number: int
    samples: list[Sample]
    resized: list[ImageArray]
    """The images on a multiple of the patch size."""


class _ResizedImages(Dataset[tuple[Sample, ImageArray]]):
    """Adds the resized image in the loader's workers."""

    def __init__(self, images: TaggedImages, patch_size: int) -> None:
        self.images = images
        self.patch_size = patch_size

    def __getitem__(self, index: int) -> tuple[Sample, ImageArray]:
        sample = self.images[index]
        return sample, np.asarray(resize_to_patches(sample["image"], self.patch_size))


class BlockPlan:
    """Who processes which block.

    Args:
        images: The data set, with its ids known in advance.
        size: Images a block.
        rank: This process.
        world_size: All processes; blocks are dealt out in turn.
    """

    def __init__(self, images: TaggedImages, *, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.images = images
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Blocks of the whole data set."""
        return -(-len(self.images.ids) // self.size)

    def ids(self, block: int) -> Sequence[str]:
        """Image ids of one block."""
        return self.images.ids[block * self.size : (block + 1) * self.size]

    def pending(self, done: set[int]) -> list[int]:
        """Blocks of this rank that are not done yet."""
        return [block for block in range(self.rank, len(self), self.world_size) if block not in done]

    def load(self, blocks: Sequence[int], *, patch_size: int, num_workers: int = 0) -> Iterator[Block]:
        """Decode blocks in order, in worker processes if there are any."""
        total = len(self.images.ids)
        batches = [list(range(b * self.size, min((b + 1) * self.size, total))) for b in blocks]
        loader = DataLoader(
            _ResizedImages(self.images, patch_size),
            batch_sampler=batches,
            collate_fn=list,
            num_workers=num_workers,
            multiprocessing_context="forkserver" if num_workers else None,
        )
        for number, items in zip(blocks, loader, strict=True):
            yield Block(number, [sample for sample, _ in items], [resized for _, resized in items])


class BlockLoader:
    """Blocks of this rank as Lightning's loops want a loader: an iterable with a length of at least one.

    A rank that has nothing to do gets one block without images: Lightning stops at a loader without batches, or
    leaves out the hooks that close what the other ranks do together.

    Args:
        images: The data set.
        size: Images a block.
        patch_size: Of the encoder.
        done: Returns ids that need no work any more; blocks of such images alone are not decoded. Asked once.
        num_workers: Processes that decode.
    """

    def __init__(
        self,
        images: TaggedImages,
        *,
        size: int,
        patch_size: int,
        done: Callable[[], Collection[str]],
        num_workers: int = 0,
    ) -> None:
        self.images = images
        self.size = size
        self.patch_size = patch_size
        self.num_workers = num_workers
        self._done = done

    @cached_property
    def _work(self) -> tuple[BlockPlan, list[int]]:
        rank, world_size = ranks()
        plan = BlockPlan(self.images, size=self.size, rank=rank, world_size=world_size)
        done = set(self._done())
        return plan, [block for block in plan.pending(set()) if not done.issuperset(plan.ids(block))]

    def __len__(self) -> int:
        """Blocks of this rank that are left, or one without images."""
        return max(1, len(self._work[1]))

    def __iter__(self) -> Iterator[Block]:
        """Decode them in order."""
        plan, blocks = self._work
        if not blocks:
            return iter([Block(len(plan), [], [])])
        return plan.load(blocks, patch_size=self.patch_size, num_workers=self.num_workers)

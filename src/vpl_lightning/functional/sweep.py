"""One pass of phase 1 over its samples: two products a chunk, on a CPU one thread a chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PixelChunk(NamedTuple):
    """All samples of some images, as the objective reads them."""

    features: Float[Tensor, "Q D"]
    weights: Float[Tensor, " Q"]
    images: Int[Tensor, " Q"]
    """Row of ``allowed`` that belongs to each sample, ascending."""
    allowed: Bool[Tensor, "images R"]
    """Prototypes of each image's own classes and of the background."""


class ChunkSums(NamedTuple):
    """Sums over samples."""

    products: Float[Tensor, "R D"]
    """Of weights, probabilities and features; float64."""
    log_partitions: Float[Tensor, ""]
    """Of the logarithms of the softmax's denominators; float64."""


class Sweep:
    """Makes passes; keeps the buffers of one for the next."""

    def __init__(self) -> None:
        self._spare: list[dict[str, Tensor]] = []

    def __call__(
        self,
        chunks: Iterable[PixelChunk],
        scaled: Float[Tensor, "R D"],
        offsets: Float[Tensor, " R"],
        *,
        restrict: bool,
        by_image: bool,
    ) -> ChunkSums:
        """Sum over all chunks.

        On a CPU as many chunks are under way as torch has threads, each with one of them: products this thin
        would spend a third of the time waiting for each other's threads. Sums are taken in the order of the
        chunks, so that the number of threads does not matter.

        Args:
            chunks: The samples.
            scaled: Prototypes over the temperature, float32.
            offsets: Added to the logits.
            restrict: Leave out what ``allowed`` leaves out.
            by_image: One second product an image instead of one a chunk.
        """
        added = offsets if bool(offsets.any()) else None

        def work(chunk: PixelChunk) -> ChunkSums:
            try:
                buffers = self._spare.pop()
            except IndexError:
                buffers = {}
            found = _sums(chunk, scaled, added, buffers, restrict=restrict, by_image=by_image)
            self._spare.append(buffers)
            return found

        products = torch.zeros_like(scaled, dtype=torch.float64)
        log_partitions = torch.zeros((), dtype=torch.float64, device=scaled.device)
        threads = torch.get_num_threads() if scaled.device.type == "cpu" else 1
        for part in _in_order(work, chunks, threads):
            products += part.products
            log_partitions += part.log_partitions
        return ChunkSums(products, log_partitions)


def _in_order(
    work: Callable[[PixelChunk], ChunkSums], chunks: Iterable[PixelChunk], threads: int
) -> Iterator[ChunkSums]:
    """Yield what ``work`` makes of each chunk; few are under way at once."""
    if threads == 1:
        yield from map(work, chunks)
        return
    waiting: deque[Future[ChunkSums]] = deque()
    try:
        with ThreadPoolExecutor(threads, "sweep", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)  # a thread's own number is also that of threads to come


def _sums(
    chunk: PixelChunk,
    scaled: Float[Tensor, "R D"],
    offsets: Float[Tensor, " R"] | None,
    buffers: dict[str, Tensor],
    *,
    restrict: bool,
    by_image: bool,
) -> ChunkSums:
    count = len(chunk.features)
    features = _buffer(buffers, "features", (count, scaled.shape[1]), scaled).copy_(chunk.features)
    logits = _buffer(buffers, "logits", (count, scaled.shape[0]), scaled)
    torch.mm(features, scaled.T, out=logits)
    if offsets is not None:
        logits.add_(offsets)
    if restrict:
        logits.masked_fill_(~chunk.allowed[chunk.images].to(scaled.device), -torch.inf)
    weights = chunk.weights.to(scaled.device)
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_partitions = (total.log() + highest)[:, 0].double() @ weights.double()
    logits.mul_(weights[:, None] / total)
    products = torch.zeros_like(scaled, dtype=torch.float64)
    part, start = _buffer(buffers, "part", (scaled.shape[0], scaled.shape[1]), scaled), 0
    for size in torch.bincount(chunk.images).tolist() if by_image else [count]:
        rows = slice(start, start + size)
        products += torch.mm(logits[rows].T, features[rows], out=part)
        start += size
    return ChunkSums(products, log_partitions)


def _buffer(buffers: dict[str, Tensor], name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
    buffer = buffers.get(name)
    size = shape[0] * shape[1]
    if buffer is None or buffer.numel() < size or buffer.device != like.device:
        buffer = buffers[name] = torch.empty(size, dtype=torch.float32, device=like.device)
    return buffer[:size].view(shape)

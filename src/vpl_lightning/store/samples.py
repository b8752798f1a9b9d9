"""What phase 1 asks of the place where its samples are kept, and what it makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.prototypes import PrototypeObjective
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.functional.statistics import AllReduce, Statistics
from vpl_lightning.functional.sweep import PixelChunk
from vpl_lightning.functional.targets import Selected

CHUNK_BYTES = 8 * 2**20
"""Bytes of the float32 features of a chunk: they stay in a CPU's cache between the two products."""
ACCELERATOR_CHUNK_BYTES = 256 * 2**20
"""The same on an accelerator: large enough to keep it busy."""


class LabelledChunk(NamedTuple):
    """Samples with their targets."""

    samples: PixelChunk
    targets: Float[Tensor, "Q R"]
    """Float16."""


class SampleSource(ABC):
    """Samples of phase 1 of one rank."""

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """Sums over this rank's samples."""

    @abstractmethod
    def chunks(self) -> Iterator[PixelChunk]:
        """Read every sample once, always in the same order, a bounded number at a time."""

    @abstractmethod
    def labelled_chunks(self) -> Iterator[LabelledChunk]:
        """Read every sample once with its target.

        Raises:
            ConfigurationError: If targets were not kept.
        """


def objective_from(
    source: SampleSource,
    columns: Columns,
    text: Float[Tensor, "C D"],
    recipe: PrototypeRecipe,
    *,
    all_reduce: AllReduce | None = None,
    world_size: int = 1,
) -> PrototypeObjective:
    """Return the objective of a recipe over collected samples.

    Args:
        source: This rank's samples.
        columns: The rows of prototypes.
        text: Text prototypes, foreground first.
        recipe: The settings.
        all_reduce: Sums over ranks; None for a single process.
        world_size: Number of ranks.

    Raises:
        DataError: If no rank has a sample.
    """
    statistics = source.statistics
    if recipe.targets.sinkhorn_rounds:
        statistics = balanced_statistics(
            source, recipe.targets.sinkhorn_rounds, gamma=recipe.targets.sinkhorn_gamma, all_reduce=all_reduce
        )
    return PrototypeObjective(
        source.chunks,
        statistics,
        columns,
        columns.reduce(text.detach().float().cpu()),
        recipe.objective,
        all_reduce=all_reduce,
        world_size=world_size,
    )


def balanced_statistics(
    source: SampleSource, rounds: int, *, gamma: float = 0.0, all_reduce: AllReduce | None = None
) -> Statistics:
    """Return this rank's statistics with the targets of the whole data set balanced between classes.

    InMaP's Sinkhorn refinement: scale the columns to given class marginals, then the rows to one, ``rounds``
    times. Only the column scales are kept, so every round is one pass over the targets. Classes without any
    target stay without.

    Args:
        source: This rank's samples, with targets.
        rounds: InMaP takes 20.
        gamma: Marginals are proportional to the mass of a class to this power; InMaP's default 0 is uniform.
        all_reduce: Sums over ranks.
    """
    reduce = all_reduce or (lambda tensor: tensor)
    mass = reduce(source.statistics.mass.clone())
    marginals = torch.where(mass > 0, mass.clamp(min=torch.finfo(mass.dtype).tiny) ** gamma, 0.0)
    marginals = marginals / marginals.sum() * mass.sum()
    scales = torch.where(mass > 0, marginals / mass, 1.0)
    for _ in range(rounds - 1):
        columns = torch.zeros_like(mass)
        for chunk in source.labelled_chunks():
            balanced = _balance(chunk.targets.double().cpu(), scales)
            columns += (balanced * chunk.samples.weights.double().cpu()[:, None]).sum(0)
        columns = reduce(columns)
        scales = scales * torch.where(columns > 0, marginals / columns, 1.0)
    total = Statistics.zeros(*source.statistics.products.shape)
    for chunk in source.labelled_chunks():
        targets = _balance(chunk.targets.double().cpu(), scales).float()
        features, weights = chunk.samples.features.cpu(), chunk.samples.weights.cpu()
        for image, allowed in enumerate(chunk.samples.allowed.cpu()):
            rows = chunk.samples.images.cpu() == image
            nothing = torch.zeros(int(rows.sum()), dtype=torch.int64)
            total = total + Statistics.of(
                Selected(features[rows], targets[rows], weights[rows], allowed, nothing)
            )
    return total


def _balance(targets: Tensor, scales: Tensor) -> Tensor:
    scaled = targets * scales
    return scaled / scaled.sum(-1, keepdim=True).clamp(min=torch.finfo(scaled.dtype).tiny)


def rows_a_chunk(width: int, device: torch.device) -> int:
    """Return how many samples of a width go into a chunk."""
    budget = CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(budget // (4 * width), 1)


def runs(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut images into runs of at most ``limit`` samples, at least one image each.

    Yields:
        The images of a run and their samples.
    """
    first = first_row = row = 0
    for index, size in enumerate(sizes):
        if row + size - first_row > limit and index > first:
            yield slice(first, index), slice(first_row, row)
            first, first_row = index, row
        row += size
    if first < len(sizes):
        yield slice(first, len(sizes)), slice(first_row, row)


def owners(sizes: Sequence[int]) -> Int[Tensor, " Q"]:
    """Return which image each sample belongs to."""
    return torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


def no_targets() -> ConfigurationError:
    """Return the error of a source that kept no targets."""
    return ConfigurationError(
        "targets.sinkhorn_rounds needs the targets of every pixel: collect with keep_targets"
    )

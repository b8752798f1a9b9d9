"""Spherical k-means: clusters of unit vectors by cosine, centres on the sphere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 100
"""Most rounds of one start; it ends earlier when no row changes its cluster."""
STARTS = 4
"""Random starts; the best is kept."""


class Clusters(NamedTuple):
    """Outcome of :func:`spherical_kmeans`."""

    centres: Float[Tensor, "k D"]
    """Unit rows."""
    assignment: Int[Tensor, " Q"]
    cohesion: float
    """Mean cosine of the rows to their centres, which k-means makes large."""


def spherical_kmeans(
    rows: Float[Tensor, "Q D"], clusters: int, *, seed: int, starts: int = STARTS, rounds: int = ROUNDS
) -> Clusters:
    """Cluster unit rows by cosine (Dhillon and Modha 2001) from k-means++ starts.

    Args:
        rows: Unit rows, at least one. Their order matters to the random starts: sort them for a result that
            does not depend on how they were collected.
        clusters: At most so many; as many as there are rows if those are fewer.
        seed: Of the starts.
        starts: How many.
        rounds: At most so many a start.
    """
    generator = torch.Generator().manual_seed(seed)
    clusters = min(clusters, len(rows))
    found = [
        _refine(rows, _spread_rows(rows, clusters, generator), rounds=rounds) for _ in range(max(1, starts))
    ]
    return max(found, key=lambda one: one.cohesion)


def _spread_rows(
    rows: Float[Tensor, "Q D"], clusters: int, generator: torch.Generator
) -> Float[Tensor, "k D"]:
    """Pick rows, each with probability in proportion to its cosine distance from those before (k-means++)."""
    picked = [int(torch.randint(len(rows), (), generator=generator))]
    nearest = rows @ rows[picked[0]]
    while len(picked) < clusters:
        far = (1 - nearest).clamp(min=0).double().cpu()
        far[picked] = 0
        if float(far.sum()) == 0:
            free = torch.ones(len(rows), dtype=torch.float64)
            free[picked] = 0
            far = free
        picked.append(int(torch.multinomial(far, 1, generator=generator)))
        nearest = torch.maximum(nearest, rows @ rows[picked[-1]])
    return rows[picked]


def _refine(rows: Float[Tensor, "Q D"], centres: Float[Tensor, "k D"], *, rounds: int) -> Clusters:
    """Lloyd's rounds; a cluster that runs empty takes the row that fits its own centre worst."""
    cosines = rows @ centres.T
    nearest, assignment = cosines.max(1)
    for _ in range(rounds):
        sums = centres.new_zeros(centres.shape).index_add_(0, assignment, rows)
        counts = torch.bincount(assignment, minlength=len(centres))
        centres = F.normalize(sums, dim=-1)
        empty = (counts == 0).nonzero().flatten()
        centres[empty] = rows[nearest.argsort()[: len(empty)]]
        before = assignment
        nearest, assignment = (rows @ centres.T).max(1)
        if bool((assignment == before).all()):
            break
    return Clusters(centres, assignment, float(nearest.double().mean()))

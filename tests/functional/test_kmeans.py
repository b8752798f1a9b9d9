"""Spherical k-means against scikit-learn and against every possible clustering."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from vpl_lightning.functional.kmeans import spherical_kmeans


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def gathered_rows(groups: int, each: int, width: int, seed: int) -> torch.Tensor:
    middles = unit_rows(groups, width, seed).repeat_interleave(each, 0)
    return F.normalize(middles + 0.1 * unit_rows(groups * each, width, seed + 1), dim=-1)


def best_cohesion(rows: torch.Tensor, clusters: int) -> float:
    """Largest mean cosine to the best centres, over all assignments; a group's best is its sum's length."""
    best = 0.0
    for choice in product(range(clusters), repeat=len(rows)):
        owner = F.one_hot(torch.tensor(choice), clusters).double()
        best = max(best, float((owner.T @ rows).norm(dim=-1).sum()) / len(rows))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_many_starts_find_the_best_clustering_of_all(seed: int) -> None:
    rows = unit_rows(8, 3, seed)
    found = spherical_kmeans(rows, 2, seed=0, starts=30)
    assert found.cohesion == pytest.approx(best_cohesion(rows, 2), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_separate_groups_equal_scikit_learns(seed: int) -> None:
    rows = gathered_rows(6, 15, 12, seed)
    found = spherical_kmeans(rows, 6, seed=1)
    theirs = KMeans(6, n_init=10, random_state=0).fit(rows.numpy())
    assert adjusted_rand_score(theirs.labels_, found.assignment.numpy()) == 1
    centres = F.normalize(torch.from_numpy(theirs.cluster_centers_), dim=-1)
    np.testing.assert_allclose((found.centres @ centres.T).max(1).values, 1, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 6), st.integers(0, 1000))
def test_a_clustering_is_a_fixed_point(count: int, clusters: int, width: int, seed: int) -> None:
    rows = unit_rows(count, width, seed)
    found = spherical_kmeans(rows, clusters, seed=seed)
    assert found.centres.shape == (min(clusters, count), width)
    torch.testing.assert_close(
        found.centres.norm(dim=-1), torch.ones(len(found.centres), dtype=torch.float64)
    )
    cosines = rows @ found.centres.T
    torch.testing.assert_close(cosines.max(1).values, cosines[torch.arange(count), found.assignment])
    assert found.cohesion == pytest.approx(float(cosines.max(1).values.mean()))
    for label in found.assignment.unique():
        own = F.normalize(rows[found.assignment == label].sum(0), dim=-1)
        torch.testing.assert_close(found.centres[label], own)


def test_the_seed_decides_alone() -> None:
    rows = unit_rows(40, 5, 0)
    torch.manual_seed(1)
    first = spherical_kmeans(rows, 6, seed=3)
    torch.manual_seed(2)
    again = spherical_kmeans(rows, 6, seed=3)
    assert torch.equal(first.centres, again.centres)
    others = [spherical_kmeans(rows, 6, seed=seed, starts=1).cohesion for seed in range(8)]
    assert len(set(others)) > 1


def test_equal_rows_are_no_trouble() -> None:
    found = spherical_kmeans(unit_rows(1, 4, 0).repeat(5, 1), 3, seed=0)
    assert found.cohesion == pytest.approx(1)
    assert bool(found.centres.isfinite().all())


def test_a_cluster_that_runs_empty_takes_a_row_that_fits_badly() -> None:
    from vpl_lightning.functional.kmeans import _refine

    rows = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
    found = _refine(rows, torch.tensor([[1.0, 0.2], [-1.0, -1.0]]), rounds=10)
    assert sorted(found.assignment.bincount().tolist()) == [1, 2]
    assert found.assignment[0] == found.assignment[1] != found.assignment[2]

"""Context prototypes: masked means, positiveness, shifts, prototype-aware maps, fusion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional as F

from vpl_lightning.functional.context import (
    feature_shift,
    fuse,
    instance_prototypes,
    positiveness,
    prototype_aware_cam,
)


def unit_rows(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_an_instance_prototype_is_the_masked_mean() -> None:
    features = unit_rows(9)
    cams = torch.tensor([[0.4] * 3 + [0.39] * 6, [0.0] * 8 + [1.0], [0.1] * 9])
    rows, means = instance_prototypes(features, cams, threshold=0.4)
    expected = np.average(features.numpy(), axis=0, weights=(cams[0] >= 0.4).numpy())
    np.testing.assert_allclose(means[0], expected, atol=1e-6)
    np.testing.assert_allclose(rows[0], expected / np.linalg.norm(expected), atol=1e-6)
    torch.testing.assert_close(rows[1], features[8])
    assert not rows[2].any()
    assert not means[2].any()


@pytest.mark.parametrize("neighbours", [1, 3, 7, 20])
def test_positiveness_keeps_the_largest(neighbours: int) -> None:
    anchor, contexts = unit_rows(1, seed=1)[0], unit_rows(7, seed=2)
    weights = positiveness(anchor, contexts, temperature=0.1, neighbours=neighbours).numpy()
    cosines = (contexts @ anchor).numpy()
    kept = np.argsort(cosines)[-min(neighbours, 7) :]
    assert set(weights.nonzero()[0]) == set(kept)
    full = softmax(cosines.astype(np.float64) / 0.1)
    np.testing.assert_allclose(weights[kept], full[kept] / full[kept].sum(), rtol=1e-4)


def test_shifts() -> None:
    anchor, mean, centre = unit_rows(3)
    assert not feature_shift("none", anchor, mean, centre).any()
    assert not feature_shift("batch", anchor, mean, None).any()
    torch.testing.assert_close(mean + feature_shift("instance", anchor, mean, centre), anchor)
    torch.testing.assert_close(mean + feature_shift("batch", anchor, mean, centre), centre)


def test_a_prototype_aware_map_against_a_loop() -> None:
    features, contexts = unit_rows(11, seed=3), unit_rows(4, seed=4)
    weights, shift = torch.tensor([0.5, 0.2, 0.0, 0.3]), 0.3 * unit_rows(1, seed=5)[0]
    found = prototype_aware_cam(features, contexts, weights, shift=shift)
    for patch, feature in enumerate(features.double() + shift.double()):
        cosines = [float(F.cosine_similarity(feature, one.double(), dim=0)) for one in contexts]
        expected = max(0.0, float(np.dot(weights, cosines)))
        assert float(found[patch]) == pytest.approx(expected, abs=1e-6)
    assert float(found.min()) == 0 < float(found.max())


def test_fusion() -> None:
    cams = torch.tensor([[[0.0, 1.0], [0.5, 0.2]]])
    aware = torch.tensor([[[0.0, 0.0], [1.0, 0.4]]])
    mean = torch.tensor([[[0.0, 0.5], [0.75, 0.3]]]) / 0.75
    largest = torch.tensor([[[0.0, 1.0], [1.0, 0.4]]])
    torch.testing.assert_close(fuse(cams, aware, fusion="mean"), mean)
    torch.testing.assert_close(fuse(cams, aware, fusion="max"), largest)
    torch.testing.assert_close(fuse(cams, aware, fusion="pacam"), aware)

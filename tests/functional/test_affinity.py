"""Class-aware affinity against explicit matrices in numpy and against OpenCV's contours."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vpl_lightning.functional.affinity import Affinity, balance, box_mask, box_masks, refine_cams


def attention(patches: int, seed: int) -> torch.Tensor:
    """Rows of a softmax over the class token and all patches, the class token cut off."""
    logits = 2 * torch.randn(patches, 1 + patches, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1)[:, 1:]


def sinkhorn(matrix: np.ndarray, rounds: int) -> np.ndarray:
    for _ in range(rounds):
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return matrix


def opencv_mask(cam: np.ndarray, threshold: float) -> np.ndarray:
    grey = (cam * 255).astype(np.uint8)
    _, binary = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros(cam.shape, bool)
    for x, y, w, h in map(cv2.boundingRect, contours):
        mask[y : min(y + h, cam.shape[0] - 1), x : min(x + w, cam.shape[1] - 1)] = True
    return mask


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_scale_vectors_are_sinkhorns_rounds_on_the_matrix(rounds: int) -> None:
    matrix = attention(17, seed=rounds)
    found = balance(matrix, rounds=rounds)
    expected = sinkhorn(matrix.numpy(), rounds)
    np.testing.assert_allclose((found.rows * found.attention * found.columns.T).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        found.symmetric(torch.eye(17, dtype=torch.float64)).numpy(), (expected + expected.T) / 2, rtol=1e-12
    )


def test_three_rounds_unless_told_otherwise() -> None:
    matrix = attention(9, seed=0)
    torch.testing.assert_close(balance(matrix), balance(matrix, rounds=3))
    assert not torch.allclose(balance(matrix).columns, balance(matrix, rounds=2).columns)


def test_a_map_inside_its_box_is_spread_by_the_square_of_the_matrix() -> None:
    cams = torch.rand(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.01
    cams[:, -1] = cams[..., -1] = 0
    matrix = attention(24, seed=2)
    balanced = sinkhorn(matrix.numpy(), 3)
    symmetric = (balanced + balanced.T) / 2
    spread = symmetric @ symmetric @ cams.flatten(1).numpy().T
    expected = (spread - spread.min(0)) / (spread.max(0) - spread.min(0))
    found = refine_cams(cams.float(), balance(matrix.float()), threshold=0.0)
    np.testing.assert_allclose(found.flatten(1).numpy().T, expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.sampled_from([0.4, 0.7]), st.integers(0, 1000))
def test_only_patches_in_a_box_send_and_every_patch_receives(
    height: int, width: int, threshold: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(height, width, generator=generator) ** 3
    matrix = attention(height * width, seed)
    balanced = sinkhorn(matrix.numpy(), 3)
    symmetric = (balanced + balanced.T) / 2
    masked = (symmetric @ symmetric) * opencv_mask(cam.numpy(), threshold).reshape(1, -1)
    spread = masked @ cam.double().numpy().reshape(-1)
    spread = spread - spread.min()
    found = refine_cams(cam[None], balance(matrix.float()), threshold=threshold)
    np.testing.assert_allclose(found.reshape(-1).numpy(), spread / (1e-7 + spread.max()), atol=2e-4)


@settings(max_examples=300, deadline=None)
@given(
    cam=arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(0, 1, width=32),
    ),
    threshold=st.sampled_from([0.0, 0.1, 0.4, 0.7, 0.99]),
)
@example(cam=np.zeros((4, 4), np.float32), threshold=0.4)
@example(cam=np.ones((4, 5), np.float32), threshold=0.7)
@example(cam=np.ones((1, 6), np.float32), threshold=0.4)
@example(cam=np.eye(5, dtype=np.float32), threshold=0.4)
@example(cam=np.pad(np.zeros((3, 3), np.float32), 1, constant_values=1), threshold=0.4)
def test_boxes_are_those_of_opencvs_contours(cam: np.ndarray, threshold: float) -> None:
    np.testing.assert_array_equal(box_mask(cam, threshold=threshold), opencv_mask(cam, threshold))


def test_boxes_of_larger_maps_with_several_regions_and_holes() -> None:
    generator = np.random.default_rng(0)
    regions = []
    for _ in range(40):
        cam = cv2.GaussianBlur(generator.random((30, 40), np.float32), (0, 0), generator.uniform(0.8, 3))
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        for threshold in (0.4, 0.7):
            expected = opencv_mask(cam, threshold)
            np.testing.assert_array_equal(box_mask(cam, threshold=threshold), expected)
            regions.append(cv2.connectedComponents((cam > threshold).astype(np.uint8))[0] - 1)
    assert max(regions) > 5


def test_the_last_row_and_column_are_never_inside_and_the_threshold_is_strict() -> None:
    mask = box_mask(np.ones((3, 4), np.float32), threshold=0.4)
    assert mask.tolist() == [[True, True, True, False]] * 2 + [[False] * 4]
    at_threshold = np.array([[102, 103, 0], [255, 0, 0], [0, 0, 0]], np.float32) / 255 + 1e-4
    assert box_mask(at_threshold, threshold=0.4)[0].tolist() == [True, True, False]
    at_threshold[1, 0] = at_threshold[0, 1] = 0
    at_threshold[2, 2] = 1
    assert not box_mask(at_threshold, threshold=0.4).any()


def test_masks_of_several_maps_are_those_of_each() -> None:
    cams = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(4)) ** 4
    found = box_masks(cams, threshold=0.5)
    for mask, cam in zip(found, cams, strict=True):
        np.testing.assert_array_equal(mask.numpy(), box_mask(cam.numpy(), threshold=0.5))


def test_an_empty_map_stays_zero_beside_others() -> None:
    cams = torch.zeros(2, 4, 4)
    cams[1, 1, 1] = 1
    found = refine_cams(cams, balance(attention(16, seed=5).float()), threshold=0.4)
    assert found[0].abs().max() == 0
    assert found[1].max() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("lost", ["column", "row"])
def test_patches_that_nobody_looks_at_or_that_look_at_none_give_no_nan(lost: str) -> None:
    matrix = attention(9, seed=6).float()
    matrix[(slice(None), 4) if lost == "column" else 4] = 0
    cams = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(7))
    found = refine_cams(cams, balance(matrix), threshold=0.4)
    assert bool(found.isfinite().all())
    assert float(found.amax((1, 2)).min()) > 0.9


def test_the_two_directions_are_not_mistaken() -> None:
    """A matrix far from symmetric: leaving out the transpose would change the product by as much."""
    matrix = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    affinity = Affinity(matrix, torch.tensor([[2.0], [3.0]]), torch.tensor([[5.0], [7.0]]))
    found = affinity.symmetric(torch.tensor([[1.0], [0.0]]))
    assert found[:, 0].tolist() == pytest.approx([2 * 0.1 * 5, (2 * 0.9 * 7 + 3 * 0.2 * 5) / 2])

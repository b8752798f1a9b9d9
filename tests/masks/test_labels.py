"""Background scores, label maps and resizing against torch, OpenCV and literal loops."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.labels import label_map, normalised, with_background
from vpl_lightning.functional.resize import resize_bilinear
from vpl_lightning.masks import MaskConfig

SIDE = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(0, 3), SIDE, SIDE), st.tuples(SIDE, SIDE), st.integers(0, 2**31))
def test_resize_equals_torch(shape, size, seed):
    maps = np.random.default_rng(seed).random(shape, np.float32)
    if shape[0] == 0:
        assert resize_bilinear(maps, size).shape == (0, *size)
        return
    expected = F.interpolate(torch.from_numpy(maps)[None], size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(resize_bilinear(maps, size), expected.numpy(), atol=1e-5)


def test_resize_equals_opencv_when_enlarging():
    maps = np.random.default_rng(0).random((3, 24, 32), np.float32)
    expected = [cv2.resize(each, (500, 375), interpolation=cv2.INTER_LINEAR) for each in maps]
    np.testing.assert_allclose(resize_bilinear(maps, (375, 500)), expected, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.5])
def test_background_is_what_no_class_claims(power):
    maps = np.random.default_rng(1).random((3, 4, 5), np.float32)
    scores = with_background(maps, power=power)
    for y in range(4):
        for x in range(5):
            assert scores[0, y, x] == pytest.approx((1 - max(maps[:, y, x])) ** power, rel=1e-5)
    np.testing.assert_array_equal(scores[1:], maps)
    assert with_background(maps[:0])[0].tolist() == np.ones((4, 5)).tolist()


def test_constant_background():
    maps = np.array([[[0.1, 0.3]], [[0.2, 0.1]]], np.float32)
    scores = with_background(maps, threshold=0.25)
    assert label_map(scores, np.array([6, 2])).tolist() == [[0, 7]]


def test_labels_follow_the_classes_in_their_order():
    scores = np.array([[[0.9, 0.1, 0.2]], [[0.05, 0.8, 0.2]], [[0.05, 0.1, 0.6]]], np.float32)
    assert label_map(scores, np.array([14, 3])).tolist() == [[0, 15, 4]]
    assert label_map(scores, np.array([14, 3]), confidence=0.7).tolist() == [[0, 15, 255]]
    assert label_map(scores, np.array([14, 3]), confidence=0.85).tolist() == [[0, 255, 255]]


def test_confidence_keeps_pixels_at_the_threshold():
    scores = np.array([[[0.5, 0.25]], [[0.5, 0.75]]], np.float32)
    assert label_map(scores, np.array([0]), confidence=0.5).tolist() == [[0, 1]]


def test_shares_sum_to_one_even_without_scores():
    scores = np.zeros((3, 1, 2), np.float32)
    scores[:, 0, 1] = (1, 2, 5)
    np.testing.assert_allclose(normalised(scores)[:, 0].T, [[1, 0, 0], [0.125, 0.25, 0.625]])


@pytest.mark.parametrize("classes", [[3], [3, 254], [-1, 2]])
def test_refuses_classes_that_do_not_fit(classes):
    with pytest.raises(DataError, match="class"):
        label_map(np.zeros((3, 2, 2), np.float32), np.array(classes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("power", 0.0),
        ("power", float("nan")),
        ("threshold", 1.0),
        ("confidence", 1.5),
        ("refiner", "magic"),
        ("crf", "none"),
    ],
)
def test_refuses_meaningless_settings(key, value):
    with pytest.raises(ConfigurationError, match=f"{key}="):
        MaskConfig(**{key: value})

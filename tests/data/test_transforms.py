"""Random views: image and mask move together, the same key gives the same view."""

import pickle

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpl_lightning.data.transforms import CLIP_MEAN_RGB, Augmentation, RandomView
from vpl_lightning.errors import ConfigurationError

COLOURS = np.array([[250, 20, 20], [20, 240, 30], [25, 30, 235], [240, 230, 15]], np.uint8)
keys = st.tuples(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 10**6))


def coloured(height, width, seed):
    """A mask of four classes in blocks, and an image in which every class has its colour."""
    blocks = np.random.default_rng(seed).integers(0, 4, (height // 9 + 1, width // 9 + 1)).astype(np.uint8)
    mask = np.kron(blocks, np.ones((9, 9), np.uint8))[:height, :width]
    return COLOURS[mask], mask


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 90),
    st.integers(4, 90),
    st.integers(8, 64),
    keys,
    st.sampled_from(
        [Augmentation(), Augmentation(scale_min=1.0, scale_max=1.0), Augmentation(scale_min=0.3)]
    ),
)
def test_image_and_mask_never_drift_apart(height, width, size, key, augmentation):
    image, mask = coloured(height, width, seed=3)
    view, labels = RandomView(size, augmentation)(image, mask, key=key)
    assert view.shape == (size, size, 3)
    assert labels.shape == (size, size)
    assert set(np.unique(labels)) <= {0, 1, 2, 3, 255}
    padded = labels == 255
    assert (view[padded] == CLIP_MEAN_RGB).all()
    # Away from borders of classes and of the view, every pixel has the colour of its label.
    inside = np.zeros_like(padded)
    for label in np.unique(labels[~padded]):
        region = (labels == label).astype(np.uint8)
        inside |= cv2.erode(region, np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    assert (np.abs(view[inside].astype(int) - COLOURS[labels[inside]]) <= 2).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (2, 3)])
def test_images_of_a_pixel_survive_the_smallest_scale(size):
    image, mask = np.full((*size, 3), 200, np.uint8), np.ones(size, np.uint8)
    view = RandomView(16, Augmentation(scale_min=0.1, scale_max=0.1))
    for number in range(20):
        pixels, labels = view(image, mask, key=(0, 0, number))
        assert pixels.shape == (16, 16, 3)
        assert set(np.unique(labels)) <= {1, 255}


@settings(max_examples=15, deadline=None)
@given(keys, keys)
def test_a_view_depends_on_its_key_alone(first, second):
    image, mask = coloured(70, 50, seed=1)
    view = RandomView(48, Augmentation(jitter=0.4))
    expected = view(image, mask, key=first)
    view(image, mask, key=second)
    other = pickle.loads(pickle.dumps(view))
    for again in (view(image, mask, key=first), other(image, mask, key=first)):
        np.testing.assert_array_equal(again[0], expected[0])
        np.testing.assert_array_equal(again[1], expected[1])


def test_flip_and_scale_are_drawn_apart():
    """With one seed for all transforms, all small views would be flipped or none."""
    image, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    mask[:, 30:] = 1
    view = RandomView(80, Augmentation(scale_min=0.5, scale_max=2.0))
    outcomes = set()
    for number in range(80):
        labels = view(image, mask, key=(0, 0, number))[1]
        ones, zeros = np.flatnonzero((labels == 1).any(0)), np.flatnonzero((labels == 0).any(0))
        outcomes.add(((labels != 255).sum() > 40 * 40, bool(ones.mean() < zeros.mean())))
    assert len(outcomes) == 4


def test_jitter_leaves_the_mask_alone():
    image, mask = coloured(60, 60, seed=2)
    still = {"scale_min": 1.0, "scale_max": 1.0}
    plain = RandomView(60, Augmentation(**still))(image, mask, key=(5, 0, 0))
    jittered = RandomView(60, Augmentation(**still, jitter=0.5))(image, mask, key=(5, 0, 0))
    np.testing.assert_array_equal(plain[1], jittered[1])
    assert (plain[0] != jittered[0]).any()


@pytest.mark.parametrize("wrong", [{"scale_min": 0.0}, {"scale_min": 3.0}, {"flip": 1.5}, {"jitter": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_an_impossible_size_is_refused():
    with pytest.raises(ConfigurationError, match="crop_size=0"):
        RandomView(0, Augmentation())

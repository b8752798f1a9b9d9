"""PAMR against a loop over pixels, and what must hold whatever the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.pamr import pamr

STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def pamr_by_loops(image, scores, *, iterations, dilations, sharpness):
    height, width = image.shape[:2]
    colours = image.astype(np.float64) / 255

    def neighbours(y, x):
        for distance in dilations:
            for dy, dx in STEPS:
                yield min(max(y + dy * distance, 0), height - 1), min(max(x + dx * distance, 0), width - 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            around = np.array([colours[at] for at in neighbours(y, x)])
            spread = np.vstack([around, colours[y, x]]).std(0)
            logits = -(np.abs(around - colours[y, x]) / (sharpness * spread + 1e-8)).mean(1)
            powers = np.exp(logits - logits.max())
            weights[y, x] = powers / powers.sum()
    scores = scores.astype(np.float64)
    for _ in range(iterations):
        scores = np.stack(
            [
                [
                    sum(
                        w * scores[:, i, j] for w, (i, j) in zip(weights[y, x], neighbours(y, x), strict=True)
                    )
                    for x in range(width)
                ]
                for y in range(height)
            ]
        ).transpose(2, 0, 1)
    return scores


@pytest.fixture
def picture():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    scores = rng.random((3, 9, 11)).astype(np.float32)
    return image, scores / scores.sum(0)


@pytest.mark.parametrize(
    "options", [{"iterations": 1, "sharpness": 0.3}, {"iterations": 3, "sharpness": 0.1}]
)
def test_equals_loops_over_pixels(picture, options):
    image, scores = picture
    options = {"dilations": (1, 3, 12), **options}
    found = pamr(torch.from_numpy(image), torch.from_numpy(scores), **options)
    np.testing.assert_allclose(found.numpy(), pamr_by_loops(image, scores, **options), atol=2e-5)


def test_follows_the_edges_of_the_image():
    rng = np.random.default_rng(2)
    truth = np.zeros((40, 40), int)
    truth[:, 22:] = 1
    image = np.where(truth[..., None] == 1, np.uint8(200), np.uint8(40)) + rng.integers(
        0, 8, (40, 40, 3)
    ).astype(np.uint8)
    scores = np.stack([truth == 0, truth == 1]).astype(np.float32) * 0.2 + rng.random((2, 40, 40)).astype(
        np.float32
    )
    refined = pamr(torch.from_numpy(image), torch.from_numpy(scores / scores.sum(0)))
    rough = (scores.argmax(0) == truth).mean()
    assert rough < 0.8 < 0.97 < (refined.argmax(0).numpy() == truth).mean()
    np.testing.assert_allclose(refined.sum(0).numpy(), 1, atol=1e-5)


def test_on_a_flat_image_scores_only_mix(picture):
    _, scores = picture
    flat = torch.full((9, 11, 3), 77, dtype=torch.uint8)
    refined = pamr(flat, torch.from_numpy(scores), iterations=1, dilations=(1,))
    inside = np.mean([scores[:, 4 + y, 5 + x] for y, x in STEPS], axis=0)
    np.testing.assert_allclose(refined[:, 4, 5].numpy(), inside, atol=1e-6)


def test_refuses_what_means_nothing(picture):
    image, scores = (torch.from_numpy(each) for each in picture)
    with pytest.raises(DataError, match="pixels"):
        pamr(image[:-1], scores)
    for wrong in ({"iterations": 0}, {"sharpness": 0.0}, {"dilations": ()}, {"dilations": (0, 1)}):
        with pytest.raises(ConfigurationError, match="pamr needs"):
            pamr(image, scores, **wrong)

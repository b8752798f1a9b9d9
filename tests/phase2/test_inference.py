"""Multi-scale inference against one scale at a time, the CRF on fewer labels against the CRF on all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning import inference
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.crf import dense_crf
from vpl_lightning.inference import (
    InferenceSpec,
    enlarge,
    image_probabilities,
    label_image,
    refine_prediction,
    scaled_size,
    segment_image,
)

PLAIN = InferenceSpec(scales=(1.0,), flip=False, long_side=None, crf=None)


def patch_means(images: Tensor) -> Tensor:
    """A model of patch size 4 that knows left from right: patch means, the first weighed by the column."""
    means = F.avg_pool2d(images, 4)
    column = torch.linspace(0, 1, means.shape[3])
    return torch.cat([means, means[:, :1] * column], 1)


def image(height: int = 22, width: int = 30) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "long_side", "scale", "expected"),
    [
        ((375, 500), 512, 1.0, (384, 512)),
        ((375, 500), 512, 0.75, (288, 384)),
        ((375, 500), None, 1.0, (384, 512)),
        ((500, 333), 512, 1.0, (512, 352)),
        ((1, 1), None, 0.5, (16, 16)),
        ((1, 4000), 512, 1.0, (16, 512)),
    ],
)
def test_sizes_are_whole_patches(size, long_side, scale, expected):
    assert scaled_size(size, long_side=long_side, scale=scale, patch_size=16) == expected


def test_one_scale_is_the_model_itself():
    pixels = image(24, 32)
    found = segment_image(patch_means, pixels, patch_size=4, spec=PLAIN)
    torch.testing.assert_close(found, patch_means(pixels[None])[0])


def test_scales_and_flips_are_averaged_on_the_grid_of_scale_one():
    pixels = image()
    spec = InferenceSpec(scales=(1.0, 0.5), flip=True, long_side=None, crf=None)
    total = torch.zeros(4, 6, 8)
    for size in ((24, 32), (12, 16)):
        view = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True):
            logits = patch_means(view.flip(3) if mirrored else view)
            logits = logits.flip(3) if mirrored else logits
            total += F.interpolate(logits, (6, 8), mode="bilinear", align_corners=False)[0] / 4
    torch.testing.assert_close(segment_image(patch_means, pixels, patch_size=4, spec=spec), total)


def test_flipping_makes_the_result_symmetric():
    spec = InferenceSpec(scales=(1.0, 0.75), flip=True, long_side=40, crf=None)
    pixels = image()
    plain = segment_image(patch_means, pixels, patch_size=4, spec=spec)
    mirrored = segment_image(patch_means, pixels.flip(2), patch_size=4, spec=spec)
    torch.testing.assert_close(mirrored.flip(2), plain)


@pytest.mark.parametrize("strip", [1, 200, 2**24])
def test_enlarging_in_strips_is_bilinear_interpolation(monkeypatch: pytest.MonkeyPatch, strip: int):
    monkeypatch.setattr(inference, "STRIP_VALUES", strip)
    scores, size = torch.randn(3, 5, 7), (33, 20)
    expected = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(enlarge(scores, size), expected)
    torch.testing.assert_close(image_probabilities(scores, size), expected.softmax(0))
    labels = label_image(scores, size)
    assert labels.dtype == torch.uint8
    assert (labels == expected.argmax(0)).float().mean() > 0.999
    assert enlarge(scores, (5, 7)).equal(scores)


def scene() -> tuple[np.ndarray, Tensor]:
    picture = np.full((40, 48, 3), 40, np.uint8)
    picture[8:30, 12:40] = (200, 60, 60)
    logits = torch.full((6, 10, 12), -8.0)
    logits[0] = 0.0
    logits[2, 2:8, 3:10] = 1.0
    logits[4, 3:5, 4:6] = -3.5
    return picture, logits


def test_crf_on_few_labels_equals_the_crf_on_all():
    picture, logits = scene()
    probabilities = image_probabilities(logits, (40, 48)).numpy()
    whole = dense_crf(picture, probabilities, "weclip")
    found = refine_prediction(picture, logits, "weclip").numpy()
    np.testing.assert_array_equal(found.argmax(0), whole.argmax(0))
    np.testing.assert_allclose(found, whole, atol=0.02)
    assert found[1].max() == found[4].max() == 0
    # The CRF draws the edge where the picture has it.
    truth = np.zeros((40, 48), np.int64)
    truth[8:30, 12:40] = 2
    assert (found.argmax(0) == truth).mean() > (probabilities.argmax(0) == truth).mean()


def test_large_images_are_refined_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch):
    picture, logits = scene()
    monkeypatch.setattr(inference, "CRF_PIXELS", 500)
    refined = refine_prediction(picture, logits, "weclip")
    assert refined.shape == (6, 20, 24)
    labels = label_image(refined, (40, 48)).numpy()
    truth = np.zeros((40, 48), np.int64)
    truth[8:30, 12:40] = 2
    assert (labels == truth).mean() > 0.9


def test_one_pixel():
    logits = segment_image(patch_means, image(1, 1), patch_size=4, spec=InferenceSpec(long_side=8))
    picture = np.zeros((1, 1, 3), np.uint8)
    assert label_image(refine_prediction(picture, logits, "weclip"), (1, 1)).shape == (1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, r"scales=\[\]"),
        ({"scales": (1.0, -0.5)}, r"scales=\[1.0, -0.5\]"),
        ({"long_side": 0}, r"long_side=0"),
        ({"crf": "sharp"}, r"crf='sharp' is no preset"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        InferenceSpec(**settings)

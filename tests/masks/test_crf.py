"""The dense CRF against direct calls of pydensecrf and against a mean field over all pairs of pixels."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from pydensecrf import densecrf
from pydensecrf.utils import unary_from_softmax

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.crf import CRF_PRESETS, CRFConfig, crf_config, dense_crf, legacy_wrapped_bgr


@pytest.fixture
def scene():
    """Two coloured halves with noise, and noisy scores of three labels that roughly know about them."""
    rng = np.random.default_rng(3)
    image = np.zeros((14, 18, 3), np.uint8)
    image[:, :9] = (200, 60, 40)
    image[:, 9:] = (30, 90, 210)
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    scores = rng.uniform(0.2, 0.6, (3, 14, 18)).astype(np.float32)
    scores[0, :, :9] += 0.35
    scores[2, :, 9:] += 0.35
    return image, scores / scores.sum(0)


def direct(image, scores, config):
    """What a script that calls the binding itself would get."""
    labels, height, width = scores.shape
    field = densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(scores)))
    field.addPairwiseGaussian(sxy=config.smooth_sigma_px, compat=config.smooth_weight)
    field.addPairwiseBilateral(
        sxy=config.bilateral_sigma_px,
        srgb=config.bilateral_sigma_rgb,
        rgbim=np.ascontiguousarray(image),
        compat=config.bilateral_weight,
    )
    return np.array(field.inference(config.iterations)).reshape(labels, height, width)


def all_pairs_mean_field(image, scores, config):
    """Every pixel with every other one, in float64: two symmetrically normalised Gaussian kernels."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    place = np.stack([y, x], -1).reshape(-1, 2) / 1.0
    colour = image.reshape(-1, 3).astype(np.float64)
    smooth = place / config.smooth_sigma_px
    bilateral = np.hstack([place / config.bilateral_sigma_px, colour / config.bilateral_sigma_rgb])
    kernels = []
    for features, weight in ((smooth, config.smooth_weight), (bilateral, config.bilateral_weight)):
        kernel = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(-1))
        degree = kernel.sum(1) ** -0.5
        kernels.append(weight * degree[:, None] * kernel * degree[None])
    kernel = sum(kernels)
    energy = -np.log(np.clip(scores, 1e-5, 1)).reshape(len(scores), -1).astype(np.float64)
    marginals = np.exp(-energy) / np.exp(-energy).sum(0)
    for _ in range(config.iterations):
        logits = -energy + marginals @ kernel
        marginals = np.exp(logits - logits.max(0))
        marginals /= marginals.sum(0)
    return marginals.reshape(scores.shape)


@pytest.mark.parametrize("name", CRF_PRESETS)
def test_every_preset_equals_direct_calls(scene, name):
    image, scores = scene
    config = CRF_PRESETS[name]
    seen = legacy_wrapped_bgr(image) if config.image == "legacy_wrapped_bgr" else image
    np.testing.assert_array_equal(dense_crf(image, scores, name), direct(seen, scores, config))


@pytest.mark.parametrize(
    "config",
    [
        CRFConfig(iterations=1, bilateral_sigma_px=8, bilateral_sigma_rgb=20),
        CRFConfig(iterations=5, smooth_sigma_px=2, bilateral_sigma_px=8, bilateral_sigma_rgb=20),
        CRFConfig(
            iterations=10, smooth_weight=1, bilateral_weight=2, bilateral_sigma_px=30, bilateral_sigma_rgb=40
        ),
    ],
)
def test_close_to_a_mean_field_over_all_pairs(scene, config):
    image, scores = scene
    found, expected = dense_crf(image, scores, config), all_pairs_mean_field(image, scores, config)
    assert np.abs(found - expected).mean() < 0.03
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.98
    assert np.abs(found - scores).mean() > 0.1  # the refinement itself is much larger than the tolerance


def test_smooths_towards_edges_of_the_image(scene):
    image, scores = scene
    rough, refined = scores.argmax(0), dense_crf(image, scores, "clip_es_rgb").argmax(0)
    truth = np.where(np.arange(18) < 9, 0, 2)[None].repeat(14, 0)
    assert (refined == truth).mean() > max(0.97, (rough == truth).mean())


def test_any_layout_and_precision_gives_the_same(scene):
    image, scores = scene
    expected = dense_crf(image, scores, "weclip")
    frozen = image.copy()
    frozen.setflags(write=False)
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    assert not mirrored.flags.c_contiguous
    np.testing.assert_array_equal(dense_crf(frozen, scores.astype(np.float64), "weclip"), expected)
    np.testing.assert_array_equal(dense_crf(mirrored, np.asfortranarray(scores), "weclip"), expected)
    half = dense_crf(image, scores.astype(np.float16), "weclip")
    np.testing.assert_allclose(half, expected, atol=0.02)


def test_no_kernel_leaves_the_scores(scene):
    image, scores = scene
    none = dense_crf(image, scores, CRFConfig(smooth_weight=0, bilateral_weight=0))
    np.testing.assert_allclose(none, scores, atol=1e-6)


def test_background_alone_is_certain(scene):
    image, _ = scene
    np.testing.assert_array_equal(
        dense_crf(image, np.full((1, 14, 18), 0.3), "clip_es"), np.ones((1, 14, 18))
    )


def test_wraps_like_the_legacy_cast():
    grey = np.arange(256, dtype=np.uint8)
    image = np.stack([grey, grey, grey], -1)[None]
    expected = np.empty_like(image)
    for channel, mean in enumerate((104.008, 116.669, 122.675)):
        for value in range(256):
            expected[0, value, channel] = int(np.float32(value) - np.float32(mean)) % 256
    np.testing.assert_array_equal(legacy_wrapped_bgr(image), expected)
    assert legacy_wrapped_bgr(np.full((1, 1, 3), 10, np.uint8))[0, 0, 0] == 256 - 94
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 255
    assert legacy_wrapped_bgr(red)[0, 0].tolist() == [152, 140, 132]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("smooth_sigma_px", 0.0),
        ("bilateral_sigma_rgb", -1.0),
        ("bilateral_sigma_px", float("nan")),
        ("smooth_weight", -0.1),
        ("image", "bgr"),
    ],
)
def test_refuses_meaningless_constants(field, value):
    with pytest.raises(ConfigurationError, match=f"crf.{field}="):
        replace(CRFConfig(), **{field: value})


def test_refuses_unknown_presets_and_sizes(scene):
    image, scores = scene
    with pytest.raises(ConfigurationError, match=r"crf='fast' is no preset; there are: clip_es"):
        crf_config("fast")
    with pytest.raises(DataError, match=r"\(14, 17\)"):
        dense_crf(image, scores[:, :, :17], "clip_es")


def test_missing_package_is_named(monkeypatch, scene):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(ConfigurationError, match=r"pydensecrf2 .*refiner='pamr'"):
        dense_crf(*scene, "clip_es")

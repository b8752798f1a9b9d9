"""The ``clip_es`` generator against an oracle written apart from it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from vpl_baselines.clip_es import ClipES

from tests.models import tiny_clip
from tests.oracles.clip_es_oracle import clip_es
from vpl_lightning import baselines
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.errors import ConfigurationError, DataError

PATCH, HEADS = 16, 2


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth blobs, so that patches differ as those of photographs do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def related_rows(count: int, seed: int) -> torch.Tensor:
    """Unit rows with the high mutual cosines of CLIP's texts."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(32, generator=generator)
    return F.normalize(common + 0.2 * torch.randn(count, 32, generator=generator), dim=-1)


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def encoder(request: pytest.FixtureRequest) -> CLIPEncoder:
    model = tiny_clip(layers=10, heads=HEADS, patch_size=PATCH, image_size=112, quick_gelu=request.param)
    return CLIPEncoder(model)


def vpl_generator(encoder: CLIPEncoder, classes: str, **options: object) -> ClipES:
    generator = baselines.create("clip_es", encoder=encoder, classes=classes, **options)
    assert isinstance(generator, ClipES)
    generator.prototypes = related_rows(len(generator.prototypes), seed=3)
    return generator


def expected(generator: ClipES, image: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    visual = generator.encoder.model.visual
    count = len(generator.classes.foreground)
    found = [
        clip_es(
            image,
            label,
            labels,
            state=dict(visual.state_dict()),
            foreground=generator.prototypes[:count],
            background=generator.prototypes[count:],
            heads=HEADS,
            patch=PATCH,
            threshold={"voc": 0.4, "coco": 0.7}[generator.classes.name],
            quick=type(visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU",
            scale=generator.scale,
        )
        for label in labels
    ]
    return np.stack([cam for cam, _ in found]), np.stack([refined for _, refined in found])


def label_image(maps: np.ndarray) -> np.ndarray:
    return np.concatenate([1 - maps.max(0, keepdims=True), maps]).argmax(0)


@pytest.mark.parametrize(
    ("size", "classes", "labels"),
    [
        ((375, 500), "voc", [14]),
        ((500, 333), "voc", [3, 0]),
        ((96, 64), "voc", [7, 19, 11]),
        ((320, 427), "coco", [0, 56, 41, 60]),
        ((112, 112), "coco", [79, 2]),
    ],
)
def test_equals_the_oracle(
    encoder: CLIPEncoder, size: tuple[int, int], classes: str, labels: list[int]
) -> None:
    image = picture(*size, seed=sum(labels))
    cams, refined = expected(vpl_generator(encoder, classes), image, labels)
    assert cams.max() > 0.5
    assert refined.max() > 0.5
    for score in ("log_probability", "probability"):
        maps = vpl_generator(encoder, classes, score=score).generate(image, labels)
        np.testing.assert_allclose(maps.cams.numpy(), cams, atol=1e-3)
        np.testing.assert_allclose(maps.refined.numpy(), refined, atol=1e-3)
        assert (label_image(maps.refined.numpy()) == label_image(refined)).mean() > 0.999
        assert maps.classes.tolist() == labels
        assert maps.size == size


def test_autograd_gives_the_same_maps_also_in_inference_mode(encoder: CLIPEncoder) -> None:
    image = picture(90, 120, seed=1)
    found = vpl_generator(encoder, "voc").generate(image, [5, 2])
    reference = vpl_generator(encoder, "voc", gradient="autograd")
    with torch.inference_mode():
        expected = reference.generate(image, [5, 2])
    torch.testing.assert_close(found.cams, expected.cams, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.refined, expected.refined, atol=1e-4, rtol=0)


def test_a_batch_equals_single_images(encoder: CLIPEncoder) -> None:
    generator = vpl_generator(encoder, "voc")
    sizes = [(90, 120), (96, 128), (64, 64), (90, 121), (80, 128)]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    labels = [[3], [1, 2, 0], [5], [7, 19], [4, 9, 11]]
    for image, ids, found in zip(images, labels, generator.generate_batch(images, labels), strict=True):
        alone = generator.generate(image, ids)
        torch.testing.assert_close(found.cams, alone.cams, atol=2e-5, rtol=0)
        # Affinity amplifies the maps' rounding: 3e-5 in float32 at most, 3e-14 where the same is done in float64.
        torch.testing.assert_close(found.refined, alone.refined, atol=5e-5, rtol=0)
        assert found.classes.tolist() == ids


def test_box_threshold_comes_from_the_class_set_unless_given(encoder: CLIPEncoder) -> None:
    assert vpl_generator(encoder, "coco").box_threshold == 0.7
    assert vpl_generator(encoder, "coco", box_threshold=0.4).box_threshold == 0.4
    with pytest.raises(ConfigurationError, match=r"box_threshold=1\.5"):
        vpl_generator(encoder, "voc", box_threshold=1.5)
    with pytest.raises(ConfigurationError, match="score='logit'"):
        vpl_generator(encoder, "voc", score="logit")
    with pytest.raises(ConfigurationError, match="gradient='numeric'"):
        vpl_generator(encoder, "voc", gradient="numeric")


def test_wrong_labels_and_images_are_refused(encoder: CLIPEncoder) -> None:
    generator = vpl_generator(encoder, "voc")
    image = picture(32, 32, seed=0)
    for labels, message in (([], "without labels"), ([20], "leave the 20"), ([1, 1], "repeat")):
        with pytest.raises(DataError, match=message):
            generator.generate(image, labels)
    with pytest.raises(DataError, match="uint8"):
        generator.generate(image.astype(np.float32), [0])

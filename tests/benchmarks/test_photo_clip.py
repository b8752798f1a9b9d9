"""The small CLIP for photographs, with random weights in place of the ImageNet stem's."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from vpl_lightning.clip import class_set
from vpl_lightning.errors import WeightsError

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import photo_clip  # noqa: E402
import photo_views  # noqa: E402
import train_photo_clip  # noqa: E402

SMALL = photo_clip.PhotoCLIPConfig(grid=4, width=64, layers=2, embed_dim=16, text_width=32, text_heads=1)


@pytest.fixture(autouse=True)
def _random_stem(monkeypatch):
    torch.manual_seed(0)
    weights = tuple(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict().values())
    monkeypatch.setattr(photo_clip, "_imagenet_weights", lambda: weights)


@pytest.fixture
def saved(tmp_path):
    model = photo_clip.build_photo_clip(SMALL).eval()
    model.visual.conv1.mean.fill_(0.1)
    path = tmp_path / "photo.safetensors"
    tokens = torch.tensor([320, 2368, 49406, 49407])
    photo_clip.save_photo_clip(model, SMALL, path, tokens=tokens, notes={"seed": "0"})
    return model, path


def test_a_saved_model_comes_back_and_equals_open_clip(saved):
    model, path = saved
    encoder = photo_clip.load_photo_clip(str(path))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (encoder.patch_size, encoder.width, encoder.joint_width, encoder.depth) == (16, 64, 16, 2)
    torch.testing.assert_close(encoder.normalise(images), pixels)
    with torch.no_grad():
        expected = encoder.model.encode_image(pixels)
        original = model.encode_image(pixels)
    torch.testing.assert_close(encoder.encode_image(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, original, atol=2e-2, rtol=2e-2)


def test_the_file_leaves_out_the_stem_and_untrained_words(saved):
    model, path = saved
    encoder = photo_clip.load_photo_clip(str(path))
    table = encoder.model.token_embedding.weight
    torch.testing.assert_close(table[320], model.token_embedding.weight[320], atol=1e-3, rtol=1e-3)
    assert not table[500].any()
    assert path.stat().st_size < 1_500_000


def test_images_of_other_sizes_get_their_own_grid(saved):
    encoder = photo_clip.load_photo_clip(str(saved[1]))
    encoded = encoder.encode(np.zeros((1, 48, 80, 3), np.uint8))
    assert encoded.grid == (3, 5)


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no CLIP for photographs"):
        photo_clip.load_photo_clip(str(tmp_path / "other.safetensors"))
    with pytest.raises(WeightsError, match="missing"):
        photo_clip.load_photo_clip(str(tmp_path / "missing.safetensors"))


def test_the_loss_is_clips_where_every_caption_fits_one_image():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    loss = train_photo_clip.contrastive_loss(20 * images @ texts.T, torch.eye(6))
    torch.testing.assert_close(loss, ClipLoss()(images, texts, torch.tensor(20.0)))


def test_shared_captions_are_no_false_negatives():
    logits = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    shared = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert train_photo_clip.contrastive_loss(logits, shared) < 0.5
    assert train_photo_clip.contrastive_loss(logits, torch.eye(3)[[1, 2, 0]]) > 5


def test_rare_tags_are_drawn_more_often_than_they_are():
    tags = [frozenset([0])] * 90 + [frozenset([1])] * 10
    drawn = Counter(train_photo_clip.balanced_order(tags, 4000, random.Random(0)))
    rare = sum(count for row, count in drawn.items() if row >= 90) / 4000
    assert rare == pytest.approx(10**0.5 / (10**0.5 + 90**0.5), abs=0.03)


def test_border_views_show_the_border_alone_and_say_so():
    photos = object.__new__(photo_views.StemFeatures)
    photos.grid, photos.tags = 6, [frozenset([3])]
    photos.features = torch.arange(36.0).expand(1, 2, 36).unsqueeze(-1)
    inner = {14, 15, 20, 21}
    settings = photo_views.Training(background=1.0)
    view = photos.view(0, settings, random.Random(0))
    assert view.tags == {photo_views.BACKGROUND}
    assert not inner & set(view.features[:, 0].long().tolist())
    view = photos.view(0, photo_views.Training(background=0.0), random.Random(0))
    assert view.tags == {3}
    assert view.features[:, 0].long().tolist() == view.places.tolist()


def test_captions_name_some_of_the_tags():
    classes = class_set(str(FOLDER / "photo_classes.yaml"))
    draw = random.Random(0)
    for _ in range(50):
        text, named = photo_views.caption(frozenset([7, 14]), classes, photo_views.Training(), draw)
        assert named
        assert named <= {7, 14}
        assert ("cat" in text) == (7 in named)
        assert ("person" in text) == (14 in named)
    text, _ = photo_views.caption(frozenset([-1]), classes, photo_views.Training(), draw)
    assert "background" in text

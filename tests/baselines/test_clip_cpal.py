"""Mechanics of the reconstruction: bank, context prototypes, options, order of images."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F
from vpl_baselines.clip_cpal import ClipCPAL
from vpl_baselines.clip_cpal.bank import SupportBank
from vpl_baselines.clip_es import ClipES

from vpl_lightning import CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.testing import sample_images

THINGS = ClassSet.from_dict({"foreground": ["cat", "dog", "boat", "tree"], "background": ["sky", "grass"]})


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(order: list[int], *, capacity: int = 5, seed: int = 0) -> SupportBank:
    bank = SupportBank(num_classes=3, width=8, capacity=capacity, seed=seed)
    values = rows(40)
    for image in order:
        bank.add(
            f"image{image}", torch.tensor([0, 2] if image % 2 else [0]), values[[image] * (1 + image % 2)]
        )
    return bank


def test_a_bank_is_bounded_and_of_its_images() -> None:
    bank = filled(list(range(40)))
    assert [len(bank.rows(label)) for label in range(3)] == [5, 0, 5]
    values = rows(40)
    for label in (0, 2):
        owners = (bank.rows(label) @ values.T).argmax(1)
        torch.testing.assert_close(bank.rows(label), values[owners])
        assert len(set(owners.tolist())) == 5
    assert all(owner % 2 for owner in (bank.rows(2) @ values.T).argmax(1).tolist())


def test_a_bank_does_not_depend_on_the_order_of_images_or_on_processes() -> None:
    order = list(range(40))
    one = filled(order).state()
    random.Random(0).shuffle(order)
    shuffled = filled(order).state()
    parts = [filled(order[start::3]).state() for start in range(3)]
    merged = filled([])
    for part in [*parts, parts[0]]:
        merged.merge(part)
    for state in (shuffled, merged.state()):
        assert {key: value.tolist() for key, value in state.items()} == {
            key: value.tolist() for key, value in one.items()
        }
    other = filled(order, seed=1).state()
    assert other["priorities"].tolist() != one["priorities"].tolist()


def test_an_image_counts_once() -> None:
    twice = filled([0, 1, 2, 1, 0])
    assert [len(twice.rows(label)) for label in range(3)] == [3, 0, 1]


def test_the_choice_has_no_favourites() -> None:
    """Every image is chosen about equally often, first and last ones included."""
    values, chosen = rows(40), torch.zeros(40)
    for seed in range(60):
        bank = filled(list(range(40)), seed=seed)
        chosen[(bank.rows(0) @ values.T).argmax(1)] += 1
    assert chosen.sum() == 300
    assert 1 <= chosen.min() <= chosen.max() <= 18


def lively(generator: CAMGenerator) -> CAMGenerator:
    """Give prototypes for which no Grad-CAM map of the samples is zero."""
    random_rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(8))
    generator.prototypes = F.normalize(random_rows, dim=-1)
    return generator


def fitted(encoder: CLIPEncoder, keys: str = "abc", **options: object) -> CAMGenerator:
    generator = lively(ClipCPAL(encoder, THINGS, **options))
    images, labels = sample_images(generator)
    for key in keys:
        index = "abc".index(key)
        generator.observe_images([key], [images[index]], [labels[index]])
    generator.fit([])
    return generator


def test_fitting_changes_maps_and_is_stored(tiny_encoder: CLIPEncoder) -> None:
    unfitted, learnt = lively(ClipCPAL(tiny_encoder, THINGS)), fitted(tiny_encoder)
    samples = sample_images(unfitted)
    state = learnt.bank_state()
    assert state["prototypes"].shape[1] == tiny_encoder.joint_width
    torch.testing.assert_close(state["prototypes"].norm(dim=-1), torch.ones(len(state["classes"])))
    again = lively(ClipCPAL(tiny_encoder, THINGS))
    again.fit([state])
    before, after, reloaded = (one.generate_batch(*samples) for one in (unfitted, learnt, again))
    assert any(not torch.allclose(one.cams, other.cams) for one, other in zip(before, after, strict=True))
    for one, other in zip(after, reloaded, strict=True):
        assert torch.equal(one.cams, other.cams)
        assert torch.equal(one.affinity, other.affinity)


def test_the_order_of_images_changes_no_map(tiny_encoder: CLIPEncoder) -> None:
    one, other = fitted(tiny_encoder), fitted(tiny_encoder, keys="cab")
    samples = sample_images(one)
    for left, right in zip(one.generate_batch(*samples), other.generate_batch(*samples), strict=True):
        assert torch.equal(left.affinity, right.affinity)


@pytest.mark.parametrize("shift", ["none", "instance", "batch"])
@pytest.mark.parametrize("fusion", ["mean", "pacam", "max"])
def test_every_option_makes_maps_of_its_own(tiny_encoder: CLIPEncoder, shift: str, fusion: str) -> None:
    usual = fitted(tiny_encoder, shift="instance", fusion="mean", seeds="refined")
    other = fitted(tiny_encoder, shift=shift, fusion=fusion, seeds="raw")
    image, labels = (values[0] for values in sample_images(usual))
    maps, expected = other.generate(image, labels), usual.generate(image, labels)
    assert maps.cams.shape == expected.cams.shape
    assert not torch.allclose(maps.cams, expected.cams)


def test_unfitted_the_own_prototype_is_the_context(tiny_encoder: CLIPEncoder) -> None:
    generator = lively(ClipCPAL(tiny_encoder, THINGS, fusion="pacam", shift="none", seed_threshold=0.5))
    image, labels = (values[0] for values in sample_images(generator))
    maps = generator.generate(image, labels)
    seeds = lively(ClipES(tiny_encoder, THINGS)).generate(image, labels).affinity.flatten(1)
    dense = tiny_encoder.dense(tiny_encoder.encode(tiny_encoder.resize(image)[None]), "value")[0]
    for row, seed in enumerate(seeds):
        own = dense[seed >= 0.5].mean(0)
        cosines = F.cosine_similarity(dense, own[None]).clamp(min=0)
        expected = (cosines - cosines.min()) / (cosines.max() - cosines.min())
        torch.testing.assert_close(maps.cams[row].flatten(), expected, atol=1e-4, rtol=0)


def test_a_class_that_is_nowhere_sure_keeps_its_grad_cam(tiny_encoder: CLIPEncoder) -> None:
    generator = fitted(tiny_encoder)
    image, labels = (values[1] for values in sample_images(generator))
    generator.seed_threshold = 1.1
    torch.testing.assert_close(
        generator.generate(image, labels).cams,
        lively(ClipES(tiny_encoder, THINGS)).generate(image, labels).cams,
    )
    generator.observe_images(["d"], [image], [labels])
    assert len(generator.bank_state()["classes"]) == len(fitted(tiny_encoder).bank_state()["classes"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fusion": "sum"}, "fusion='sum' is none of mean, pacam, max"),
        ({"shift": "class"}, "shift='class' is none of none, instance, batch"),
        ({"seeds": "crf"}, "seeds='crf' is none of refined, raw"),
        ({"features": "token"}, "features='token' is none of value"),
        ({"seed_threshold": 1.0}, r"seed_threshold=1.0 must lie in \[0, 1\)"),
        ({"box_threshold": -0.1}, r"box_threshold=-0.1 must lie in \[0, 1\)"),
        ({"capacity": 0}, "capacity=0 must be at least 1"),
        ({"clusters": 0}, "clusters=0 must be at least 1"),
        ({"neighbours": 0}, "neighbours=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_wrong_options_are_refused(tiny_encoder: CLIPEncoder, options: dict, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        ClipCPAL(tiny_encoder, THINGS, **options)

"""Every registered generator keeps the contract, and the suite finds out those that do not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vpl_baselines.external
from vpl_baselines.dense_similarity import DenseSimilarity

from tests.models import tiny_clip
from vpl_lightning import CAMGenerator, baselines
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.structures import ClassCAMs
from vpl_lightning.testing import CHECKS, Samples, check_generator, sample_images

THINGS = ClassSet.from_dict({"foreground": ["cat", "dog", "boat", "tree"], "background": ["sky", "grass"]})
STAND_IN = Path(vpl_baselines.external.__file__).with_name("example.py")
COMMAND = [sys.executable, str(STAND_IN), "{images}", "{labels}", "{prototypes}", "{output}"]
OPTIONS = {"external": {"command": COMMAND}}


def build(name: str) -> CAMGenerator:
    encoder = CLIPEncoder(tiny_clip())
    return baselines.create(name, encoder=encoder, classes=THINGS, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", [name for name in baselines if name != "external"])
def test_a_registered_generator_keeps_the_contract(name: str) -> None:
    generator = build(name)
    check_generator(generator)
    if generator.needs_fit:
        samples = sample_images(generator)
        generator.observe_images(["a", "b", "c"], samples.images, samples.labels)
        generator.fit([generator.bank_state()])
        check_generator(generator)


def test_an_outside_command_keeps_the_contract() -> None:
    generator = build("external")
    images, labels = sample_images(generator)
    check_generator(generator, images[:2], labels[:2])


def test_samples_share_a_grid_and_have_another(tiny_encoder: CLIPEncoder) -> None:
    samples = sample_images(DenseSimilarity(tiny_encoder, THINGS))
    grids = [tiny_encoder.resize(image).shape for image in samples.images]
    assert grids[0] == grids[1] != grids[2]
    assert max(len(ids) for ids in samples.labels) == 3
    one = ClassSet.from_dict({"foreground": ["cat"], "background": ["sky"]})
    assert sample_images(DenseSimilarity(tiny_encoder, one)).labels == [[0], [0], [0]]


class Altered(DenseSimilarity):
    """A sound generator whose maps or whose surroundings a subclass spoils."""

    def localise(self, images, encoded, labels):
        found = super().localise(images, encoded, labels)
        self.surroundings(images)
        return [self.spoil(maps, found) for maps in found]

    def surroundings(self, images) -> None:
        pass

    def spoil(self, maps, found):
        return maps


def changed(maps: ClassCAMs, cams, affinity=None) -> ClassCAMs:
    return ClassCAMs(maps.classes, cams, maps.affinity if affinity is None else affinity, maps.size)


class Transposed(Altered):
    def spoil(self, maps, found):
        return changed(maps, maps.cams.mT.contiguous())


class Doubled(Altered):
    def spoil(self, maps, found):
        return changed(maps, maps.cams * 2)


class Undefined(Altered):
    def spoil(self, maps, found):
        return changed(maps, maps.cams, maps.affinity.clone().fill_(float("nan")))


class Noisy(Altered):
    def spoil(self, maps, found):
        return changed(maps, (maps.cams + 0.01 * torch.rand(())).clamp(max=1))


class ScaledOverBatch(Altered):
    def spoil(self, maps, found):
        return changed(maps, maps.cams / len(found))


class TextAlways(Altered):
    def localise(self, images, encoded, labels):
        own, self._prototypes = self._prototypes, self.text_prototypes
        try:
            return super().localise(images, encoded, labels)
        finally:
            self._prototypes = own


class SortedLabels(Altered):
    def localise(self, images, encoded, labels):
        return super().localise(images, encoded, [ids.sort().values for ids in labels])


class MapsOfSortedLabels(Altered):
    """Names the labels as asked, but gives the maps in the order of the class set."""

    def spoil(self, maps, found):
        order = maps.classes.argsort()
        return changed(maps, maps.cams[order], maps.affinity[order])


class Differentiable(Altered):
    def spoil(self, maps, found):
        return changed(maps, maps.cams.clone().requires_grad_())


class GradientsOff(Altered):
    def surroundings(self, images) -> None:
        torch.set_grad_enabled(False)


class Hooked(Altered):
    def surroundings(self, images) -> None:
        self.encoder.model.visual.ln_post.register_forward_hook(lambda *_: None)


class Thawed(Altered):
    def surroundings(self, images) -> None:
        self.encoder.model.visual.proj.requires_grad_(True)


class Drifting(Altered):
    def surroundings(self, images) -> None:
        self.text_prototypes.mul_(0.5)


class Painting(Altered):
    def surroundings(self, images) -> None:
        for image in images:
            image[0, 0] = 255 - image[0, 0]


BROKEN = {
    Transposed: ("shapes", "cams are "),
    Undefined: ("finite", "affinity holds values that are not finite"),
    Doubled: ("range", "cams runs from 0 to 2"),
    Noisy: ("determinism", "a second call changes maps"),
    ScaledOverBatch: ("batch", "differ from those of single images"),
    TextAlways: ("prototypes", "other prototypes change no map"),
    SortedLabels: ("labels", "came back as"),
    MapsOfSortedLabels: ("labels", "reversed labels"),
    Differentiable: ("gradients", "cams carries a gradient"),
    GradientsOff: ("gradients", "switched off"),
    Hooked: ("hooks", "ln_post' has 2 hooks, 0 before the call"),
    Thawed: ("frozen", "model.visual.proj"),
    Drifting: ("state", "text_prototypes"),
    Painting: ("state", "changed an image"),
}
ALSO_SPOILT = {
    Noisy: {"batch", "labels", "prototypes"},
    Painting: {"batch", "determinism", "labels", "prototypes"},
}
"""Checks that may fail too: noise makes maps differ under any comparison, as does another image."""
LASTING = (Hooked, Thawed)
"""Those that change the encoder for good."""


@pytest.fixture(autouse=True)
def _gradients_on():
    yield
    torch.set_grad_enabled(True)


def samples_of(generator: CAMGenerator) -> Samples:
    images, labels = sample_images(generator)
    return Samples([np.array(image) for image in images], labels)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_generator_fails_for_its_reason(broken: type[CAMGenerator]) -> None:
    name, reason = BROKEN[broken]
    encoder = CLIPEncoder(tiny_clip())
    generator = broken(encoder, THINGS)
    with pytest.raises(AssertionError, match=reason):
        CHECKS[name](generator, *samples_of(generator))
    for other in set(CHECKS) - {name} - ALSO_SPOILT.get(broken, set()):
        generator = broken(CLIPEncoder(tiny_clip()) if broken in LASTING else encoder, THINGS)
        CHECKS[other](generator, *samples_of(generator))


def test_the_whole_suite_names_the_check(tiny_encoder: CLIPEncoder) -> None:
    with pytest.raises(AssertionError, match=r"^range: cams runs from 0 to 2"):
        check_generator(Doubled(tiny_encoder, THINGS))


def test_images_come_with_labels(tiny_encoder: CLIPEncoder) -> None:
    generator = DenseSimilarity(tiny_encoder, THINGS)
    with pytest.raises(ValueError, match="together"):
        check_generator(generator, images=sample_images(generator).images)

"""The generator contract as checks that the author of a plug-in can run.

All at once::

    check_generator(baselines.create("mine", encoder=encoder, classes="voc"))

or one test a check, under pytest::

    @pytest.mark.parametrize("name", CHECKS)
    def test_contract(name, generator):
        CHECKS[name](generator, *sample_images(generator))

A check raises ``AssertionError`` with its reason. None needs pytest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.cams import CAMGenerator
from vpl_lightning.structures import ClassCAMs, ImageArray

Images = Sequence[ImageArray]
Labels = Sequence[Sequence[int]]
Check = Callable[[CAMGenerator, Images, Labels], None]

BATCH_TOLERANCE = 1e-3
"""How far maps of a batch may be from those of single images: products of other sizes round differently."""
RANGE_TOLERANCE = 1e-5
"""How far a map may leave [0, 1] by rounding."""
SWAPPED_CHANGE = 1e-3
"""How much some map must change with other prototypes."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SAMPLE_PATCHES = ((5, 6), (5, 6), (4, 7))
"""Patch grids of the sample images: two that share one, so that a batch forms, and another."""


class Samples(NamedTuple):
    """Images and labels to check with."""

    images: list[ImageArray]
    labels: list[list[int]]


def sample_images(generator: CAMGenerator, *, seed: int = 0) -> Samples:
    """Draw images of soft coloured blobs, none of them a patch multiple, with up to three classes each."""
    rng = np.random.default_rng(seed)
    patch, classes = generator.encoder.patch_size, len(generator.classes.foreground)
    images = []
    for rows, columns in SAMPLE_PATCHES:
        height, width = rows * patch - 1, columns * patch - patch // 4
        coarse = torch.from_numpy(rng.random((1, 3, 4, 4)))
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
        noise = rng.normal(0, 0.05, (height, width, 3))
        pixels = (smooth.permute(1, 2, 0).numpy() + noise).clip(0, 1)
        images.append((pixels * 255).astype(np.uint8))
    wanted = ([classes - 1, 0], [0], [2, 0, 1])
    labels = [list(dict.fromkeys(label for label in ids if 0 <= label < classes)) for ids in wanted]
    return Samples(images, labels)


def check_generator(
    generator: CAMGenerator, images: Images | None = None, labels: Labels | None = None
) -> None:
    """Run every check of :data:`CHECKS`.

    Args:
        generator: Built with any encoder and class set; two classes or more show most.
        images: uint8 ``(H, W, 3)``; :func:`sample_images` unless given.
        labels: 0-based foreground ids of each image; given together with ``images``.

    Raises:
        AssertionError: At the first check that fails, with its name and reason.
        ValueError: If only one of ``images`` and ``labels`` is given.
    """
    if (images is None) != (labels is None):
        raise ValueError("give images together with their labels, or neither")
    if images is None or labels is None:
        images, labels = sample_images(generator)
    for name, check in CHECKS.items():
        try:
            check(generator, images, labels)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_shapes(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """One :class:`ClassCAMs` an image, a map a label; raw maps on the patch grid, refined at image size."""
    found = generator.generate_batch(images, labels)
    _require(len(found) == len(images), f"{len(found)} results for {len(images)} images")
    for image, ids, maps in zip(images, labels, found, strict=True):
        _require(isinstance(maps, ClassCAMs), f"a result is {type(maps).__name__}, not ClassCAMs")
        rows, columns = generator.encoder.resize(image).shape[:2]
        patch, size = generator.encoder.patch_size, image.shape[:2]
        expected = (len(ids), rows // patch, columns // patch)
        _require(tuple(maps.cams.shape) == expected, f"cams are {tuple(maps.cams.shape)}, not {expected}")
        _require(
            maps.affinity.ndim == 3 and len(maps.affinity) == len(ids),
            f"affinity is {tuple(maps.affinity.shape)} for {len(ids)} labels",
        )
        _require(tuple(maps.size) == size, f"size is {tuple(maps.size)} for an image of {size}")
        _require(
            tuple(maps.refined.shape) == (len(ids), *size),
            f"refined is {tuple(maps.refined.shape)} for an image of {size}",
        )
        for what, values in _maps(maps):
            _require(values.dtype == torch.float32, f"{what} is {values.dtype}, not float32")


def check_finite(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """No NaN, no infinity."""
    for maps in generator.generate_batch(images, labels):
        for what, values in _maps(maps):
            _require(bool(values.isfinite().all()), f"{what} holds values that are not finite")


def check_range(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """All maps lie in [0, 1]."""
    for maps in generator.generate_batch(images, labels):
        for what, values in _maps(maps):
            low, high = (float(value) for value in values.detach().aminmax())
            inside = low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE
            _require(
                inside or not np.isfinite([low, high]).all(), f"{what} runs from {low:.4g} to {high:.4g}"
            )


def check_determinism(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """The same call gives the same maps to the bit, whatever the state of the random number generators."""
    first = generator.generate_batch(images, labels)
    torch.rand(7)
    np.random.default_rng().random(7)
    distance = _distance(first, generator.generate_batch(images, labels))
    _require(distance == 0, f"a second call changes maps by {distance:.3g}")


def check_batch(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """A batch gives the maps of one call an image."""
    together = generator.generate_batch(images, labels)
    alone = [generator.generate(image, ids) for image, ids in zip(images, labels, strict=True)]
    distance = _distance(together, alone)
    _require(
        distance <= BATCH_TOLERANCE, f"maps of a batch differ from those of single images by {distance:.3g}"
    )


def check_prototypes(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """Other prototypes change the maps; the first ones bring the first maps back."""
    before, own = generator.generate_batch(images, labels), generator.prototypes.clone()
    random = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
    generator.prototypes = F.normalize(random, dim=-1)
    try:
        changed = _distance(before, generator.generate_batch(images, labels))
    finally:
        generator.prototypes = own
    _require(changed >= SWAPPED_CHANGE, f"other prototypes change no map by more than {changed:.3g}")
    kept = _distance(before, generator.generate_batch(images, labels))
    _require(kept <= BATCH_TOLERANCE, f"the first prototypes again, and maps still differ by {kept:.3g}")


def check_labels(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """Maps come in the order of the labels: reversed labels reverse them."""
    for image, ids in zip(images, labels, strict=True):
        forward, backward = generator.generate(image, ids), generator.generate(image, ids[::-1])
        for maps, asked in ((forward, ids), (backward, ids[::-1])):
            _require(
                maps.classes.tolist() == list(asked), f"labels {asked} came back as {maps.classes.tolist()}"
            )
        turned = ClassCAMs(
            backward.classes.flip(0), backward.cams.flip(0), backward.affinity.flip(0), backward.size
        )
        distance = _distance([forward], [turned])
        _require(distance <= BATCH_TOLERANCE, f"reversed labels {ids} change maps by {distance:.3g}")


def check_gradients(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """Maps carry no gradient, parameters get none, and gradients stay switched on."""
    with torch.enable_grad():
        found = generator.generate_batch(images, labels)
        _require(torch.is_grad_enabled(), "gradients are switched off after the call")
    for maps in found:
        for what, values in _maps(maps):
            _require(not values.requires_grad, f"{what} carries a gradient")
    for name, parameter in generator.named_parameters():
        _require(parameter.grad is None, f"parameter {name} has got a gradient")


def check_hooks(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """No module has another number of hooks after the call."""
    before = _hooks(generator)
    generator.generate_batch(images, labels)
    for name, count in _hooks(generator).items():
        earlier = before.get(name, 0)
        _require(count == earlier, f"module '{name}' has {count} hooks, {earlier} before the call")


def check_frozen(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """The call leaves every ``requires_grad`` and training mode as it was."""
    before = _flags(generator)
    generator.generate_batch(images, labels)
    changed = [name for name, flag in _flags(generator).items() if before.get(name) != flag]
    _require(not changed, f"requires_grad or training mode changed of {', '.join(changed[:3])}")


def check_state(generator: CAMGenerator, images: Images, labels: Labels) -> None:
    """The call changes neither parameters and buffers nor the images."""
    given = [image.copy() for image in images]
    before = _digests(generator)
    generator.generate_batch(given, labels)
    changed = [name for name, digest in _digests(generator).items() if before.get(name) != digest]
    _require(not changed, f"the call changed {', '.join(changed[:3])}")
    kept = all(np.array_equal(one, other) for one, other in zip(given, images, strict=True))
    _require(kept, "the call changed an image")


CHECKS: dict[str, Check] = {
    "shapes": check_shapes,
    "finite": check_finite,
    "range": check_range,
    "determinism": check_determinism,
    "batch": check_batch,
    "prototypes": check_prototypes,
    "labels": check_labels,
    "gradients": check_gradients,
    "hooks": check_hooks,
    "frozen": check_frozen,
    "state": check_state,
}
"""Every check by name, each ``check(generator, images, labels)``."""


def _require(held: bool, reason: str) -> None:
    if not held:
        raise AssertionError(reason)


def _maps(maps: ClassCAMs) -> tuple[tuple[str, Tensor], ...]:
    return ("cams", maps.cams), ("affinity", maps.affinity)


def _distance(first: Sequence[ClassCAMs], second: Sequence[ClassCAMs]) -> float:
    """Largest difference between maps; infinite where shapes differ; NaN equals NaN."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        for (_, left), (_, right) in zip(_maps(one), _maps(other), strict=True):
            if left.shape != right.shape:
                return float("inf")
            if left.numel():
                largest = max(
                    largest, float((left.detach().nan_to_num() - right.detach().nan_to_num()).abs().max())
                )
    return largest


def _hooks(generator: CAMGenerator) -> dict[str, int]:
    return {
        name: sum(len(getattr(module, kind)) for kind in HOOKS) for name, module in generator.named_modules()
    }


def _flags(generator: CAMGenerator) -> dict[str, bool]:
    trainable = {name: parameter.requires_grad for name, parameter in generator.named_parameters()}
    modes = {f"module '{name}'": module.training for name, module in generator.named_modules()}
    return {**trainable, **modes}


def _digests(generator: CAMGenerator) -> dict[str, str]:
    tensors = [*generator.named_parameters(), *generator.named_buffers()]
    return {name: hashlib.blake2b(_bytes(value)).hexdigest() for name, value in tensors}


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

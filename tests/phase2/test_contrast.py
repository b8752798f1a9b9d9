"""RSC against literal loops over images, classes and regions, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.contrast import pool_regions, region_class, region_masks, tcl_sampled

N, D = 5, 6
Loss = Callable[..., Tensor]


def unit(*shape: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=dim)


def tags(*rows: tuple[int, ...]) -> Tensor:
    present = torch.zeros(len(rows), N, dtype=torch.bool)
    for row, classes in enumerate(rows):
        present[row, list(classes)] = True
    return present


@pytest.fixture
def prototypes() -> Tensor:
    return unit(N + 2, D, dim=1, seed=1)


def embedding_of(count: int, seed: int = 0) -> Tensor:
    return unit(count, D, 3, 4, dim=1, seed=seed)


def literal_region(embedding: Tensor, prototypes: Tensor, image: int, label: int) -> list[float]:
    """Mean of the pixels of one image, weighed with sigmoid(10 cos - 2.5), scaled to length one."""
    total, weight = [0.0] * D, 1e-6
    for y in range(embedding.shape[2]):
        for x in range(embedding.shape[3]):
            pixel = embedding[image, :, y, x].tolist()
            cosine = sum(a * b for a, b in zip(pixel, prototypes[label].tolist(), strict=True))
            mask = 1 / (1 + math.exp(-(10 * cosine - 2.5)))
            weight += mask
            total = [t + mask * p for t, p in zip(total, pixel, strict=True)]
    mean = [t / weight for t in total]
    length = math.sqrt(sum(m * m for m in mean))
    return [m / length for m in mean]


def cosine(region: list[float], prototype: Tensor) -> float:
    return sum(a * b for a, b in zip(region, prototype.tolist(), strict=True))


def literal_tcl(embedding: Tensor, prototypes: Tensor, drawn: dict[int, int], possible: Tensor) -> float:
    losses = []
    for i, own in drawn.items():
        exp = {}
        for a, b in [(i, j) for j in drawn] + [(j, i) for j in drawn]:
            region = literal_region(embedding, prototypes, a, drawn[b])
            exp[a, b] = math.exp(cosine(region, prototypes[drawn[b]]) / 0.07)
        row = sum(exp[i, j] for j in drawn if j == i or not possible[i, drawn[j]])
        column = sum(exp[j, i] for j in drawn if j == i or not possible[j, own])
        losses.append(-0.5 * (math.log(exp[i, i] / row) + math.log(exp[i, i] / column)))
    return sum(losses) / len(losses)


def literal_region_class(embedding: Tensor, prototypes: Tensor, present: Tensor) -> float:
    regions = [(i, n) for i in range(len(present)) for n in range(N) if present[i, n]]
    pooled = {r: literal_region(embedding, prototypes, *r) for r in regions}
    losses = []
    for image, label in regions:
        own = math.exp(cosine(pooled[image, label], prototypes[label]) / 0.07)
        row = sum(math.exp(cosine(pooled[image, label], prototypes[n]) / 0.07) for n in range(N))
        column = own + sum(
            math.exp(cosine(pooled[r], prototypes[label]) / 0.07) for r in regions if r[1] != label
        )
        losses.append(-0.5 * (math.log(own / row) + math.log(own / column)))
    return sum(losses) / len(losses)


def tcl(embedding: Tensor, prototypes: Tensor, present: Tensor, possible: Tensor | None = None) -> Tensor:
    masks = region_masks(embedding, prototypes)
    return tcl_sampled(embedding, prototypes, masks, present, present if possible is None else possible)


def region(embedding: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
    return region_class(embedding, prototypes, region_masks(embedding, prototypes), present)


def test_tcl_equals_the_loop(prototypes: Tensor):
    embedding = embedding_of(5)
    # One certain class an image makes the draw known; image 2 shows none; tags beyond the crop only exclude.
    drawn = {0: 3, 1: 0, 3: 3, 4: 2}
    present = tags((3,), (0,), (), (3,), (2,))
    possible = tags((3, 0), (0,), (2,), (3,), (2, 1))
    expected = literal_tcl(embedding, prototypes, drawn, possible)
    assert tcl(embedding, prototypes, present, possible).item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_tcl_draws_among_present_classes(prototypes: Tensor):
    embedding, present = embedding_of(2), tags((0, 4), (2,))
    expected = sorted(literal_tcl(embedding, prototypes, {0: n, 1: 2}, present) for n in (0, 4))
    masks = region_masks(embedding, prototypes)
    found = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        loss = tcl_sampled(embedding, prototypes, masks, present, present, generator=generator)
        found.add(round(loss.item(), 9))
    assert sorted(found) == pytest.approx(expected, abs=1e-8)


def test_region_class_equals_the_loop(prototypes: Tensor):
    embedding, present = embedding_of(4), tags((0, 3), (3,), (), (1, 2, 4))
    expected = literal_region_class(embedding, prototypes, present)
    assert region(embedding, prototypes, present).item() == pytest.approx(expected, rel=1e-9)


def test_region_class_works_on_one_image(prototypes: Tensor):
    embedding, present = embedding_of(1), tags((0, 3))
    expected = literal_region_class(embedding, prototypes, present)
    assert region(embedding, prototypes, present).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [tcl, region])
def test_order_of_images_and_names_of_classes_do_not_matter(loss: Loss, prototypes: Tensor):
    embedding, present = embedding_of(4), tags((0,), (3,), (1,), (4,))
    expected = loss(embedding, prototypes, present)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(embedding[order], prototypes, present[order]), expected)
    names = torch.tensor([4, 2, 0, 1, 3])
    renamed = torch.cat([prototypes[:N][names], prototypes[N:]])
    torch.testing.assert_close(loss(embedding, renamed, present[:, names]), expected)


@pytest.mark.parametrize("loss", [tcl, region])
def test_a_step_downhill_brings_regions_to_their_prototypes(loss: Loss, prototypes: Tensor):
    embedding, present = embedding_of(3).requires_grad_(), tags((0,), (3,), (1,))
    before = loss(embedding, prototypes, present)
    before.backward()
    after = F.normalize(embedding.detach() - 0.1 * embedding.grad, dim=1)
    assert loss(after, prototypes, present) < before

    def own_cosine(pixels: Tensor) -> Tensor:
        pooled = pool_regions(pixels, region_masks(pixels, prototypes))
        return torch.stack([pooled[i, n] @ prototypes[n] for i, n in enumerate((0, 3, 1))]).mean()

    assert own_cosine(after) > own_cosine(embedding.detach())


@pytest.mark.parametrize("loss", [tcl, region])
def test_perfect_regions_score_lower_than_swapped_ones(loss: Loss):
    prototypes = torch.eye(D, dtype=torch.float64)[: N + 1]
    right = prototypes[[0, 3]][:, :, None, None].expand(-1, -1, 3, 4)
    present = tags((0,), (3,))
    assert loss(right, prototypes, present) < 1e-4 < 1 < loss(right.flip(0), prototypes, present)


@pytest.mark.parametrize("loss", [tcl, region])
def test_gradients_are_those_of_finite_differences(loss: Loss, prototypes: Tensor):
    present = tags((0,), (3,), ())
    raw = embedding_of(3)[:, :, :2, :2].clone().requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.5, dtype=torch.float64, requires_grad=True)

    def value(raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        embedding = F.normalize(raw, dim=1)
        masks = region_masks(embedding, prototypes, scale=scale, bias=bias)
        extra = (present,) if loss is region else (present, present)
        return (region_class if loss is region else tcl_sampled)(embedding, prototypes, masks, *extra)

    assert torch.autograd.gradcheck(value, (raw, scale, bias))


@pytest.mark.parametrize("loss", [tcl, region])
@pytest.mark.parametrize("rows", [((), (), ()), ()], ids=["no-foreground", "no-image"])
def test_nothing_to_contrast_costs_nothing(loss: Loss, rows: tuple[tuple[int, ...], ...], prototypes: Tensor):
    embedding = embedding_of(len(rows)).requires_grad_()
    value = loss(embedding, prototypes, tags(*rows))
    value.backward()
    assert value.item() == 0
    assert embedding.grad.abs().sum() == 0


def test_one_class_has_no_negatives_in_tcl(prototypes: Tensor):
    embedding = embedding_of(3).requires_grad_()
    value = tcl(embedding, prototypes, tags((2,), (2,), (2,)))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert embedding.grad.abs().max() < 1e-12


def test_one_class_leaves_the_row_term_of_regions(prototypes: Tensor):
    embedding = embedding_of(2)
    one = region(embedding, prototypes, tags((2,), (2,)))
    assert one.item() == pytest.approx(literal_region_class(embedding, prototypes, tags((2,), (2,))))
    alone = prototypes[[2]]
    masks = region_masks(embedding, alone)
    assert region_class(embedding, alone, masks, torch.ones(2, 1, dtype=torch.bool)).item() == 0


def test_softmax_masks_are_shares(prototypes: Tensor):
    embedding = embedding_of(2)
    masks = region_masks(embedding, prototypes, kind="softmax", scale=7.0, bias=3.0)
    similarity = torch.stack([(embedding * p[None, :, None, None]).sum(1) for p in prototypes], 1)
    torch.testing.assert_close(masks, F.softmax(7 * similarity, 1))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_pooled_regions_have_unit_length(kind: str, prototypes: Tensor):
    embedding = embedding_of(2)
    pooled = pool_regions(embedding, region_masks(embedding, prototypes, kind=kind))
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2, N + 2, dtype=torch.float64))

"""Seeds and targets, against a transcription of their definition pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.gap import angle_between, gap_centroid, gap_cos, modify_gap, region_sums
from vpl_lightning.functional.sampling import keep_smallest, pixel_priorities
from vpl_lightning.functional.targets import Selected, TargetConfig, inverse_class_frequency, select_pixels

N, M, D = 5, 3, 16
CLASSES = [3, 0, 4]


def image(seed: int = 0, *, size: tuple[int, int] = (8, 9)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cams = torch.rand(len(CLASSES), *size, generator=generator) ** 2
    cams[:, :2] *= 0.1
    features = F.normalize(torch.randn(size[0] * size[1], D, generator=generator), dim=-1)
    text = F.normalize(torch.randn(N + M, D, generator=generator), dim=-1)
    return cams, features, text


def choose(
    seed: int = 0, *, class_weights: Tensor | None = None, key: str = "a", **config: object
) -> Selected:
    cams, features, text = image(seed)
    return select_pixels(
        cams,
        features,
        text,
        torch.tensor(CLASSES),
        num_foreground=N,
        config=TargetConfig(**{"tau_text": 0.2, **config}),
        key=key,
        class_weights=class_weights,
    )


def softmax(scores: dict[int, float]) -> np.ndarray:
    total = sum(np.exp(score) for score in scores.values())
    return np.array([np.exp(scores[c]) / total if c in scores else 0.0 for c in range(N + M)])


def one_hot(index: int) -> np.ndarray:
    return np.eye(N + M)[index]


def expected_target(mode: str, cam: np.ndarray, score: np.ndarray, restrict: str) -> np.ndarray | None:
    """The table of TargetConfig's docstring, one pixel at a time; None where the pixel is not used."""
    words = set(range(N, N + M))
    support = set(CLASSES) | words if restrict == "present" else set(range(N + M))
    text = softmax({c: score[c] for c in support})
    if mode == "soft":
        return text
    if mode == "hardened":
        return one_hot(int(text.argmax())) if text.max() > 0.6 else text
    of_words = softmax({c: score[c] for c in words})
    seeds = [c for c, value in zip(CLASSES, cam, strict=True) if value >= 0.4]
    best = CLASSES[int(cam.argmax())]
    if seeds:
        return {
            "seed_hard": one_hot(best),
            "seeded_soft": one_hot(best) if len(seeds) == 1 else text,
            "prod": softmax({c: score[c] for c in seeds}),
            "avg": (text + one_hot(best)) / 2,
        }[mode]
    if cam.max() < 0.15:
        return {
            "seed_hard": one_hot(int(of_words.argmax())),
            "seeded_soft": of_words,
            "prod": of_words,
            "avg": (text + of_words) / 2,
        }[mode]
    return None


@pytest.mark.parametrize("restrict", ["present", "all"])
@pytest.mark.parametrize("mode", ["soft", "hardened", "seed_hard", "seeded_soft", "prod", "avg"])
def test_every_mode_equals_its_definition(mode: str, restrict: str) -> None:
    cams, features, text = image()
    rounded = features.half().double()
    scores = (rounded @ text.double().T / 0.2).numpy()
    wanted = [
        expected_target(mode, cam, score, restrict)
        for cam, score in zip(cams.flatten(1).T.double().numpy(), scores, strict=True)
    ]
    used = [index for index, target in enumerate(wanted) if target is not None]
    found = choose(mode=mode, restrict=restrict)
    assert torch.equal(found.features, features.half()[used])
    np.testing.assert_allclose(found.targets, np.stack([wanted[index] for index in used]), atol=1e-6)
    assert found.allowed.tolist() == [True, False, False, True, True, True, True, True]
    torch.testing.assert_close(found.weights, torch.ones(len(used)))
    if mode not in ("soft", "hardened"):
        kinds = {target.argmax() >= N for target in wanted if target is not None}
        assert kinds == {True, False}
        assert len(used) < len(wanted)


def test_one_shared_background_gets_the_words_mass() -> None:
    every, one = choose(mode="avg"), choose(mode="avg", background="learn_one")
    torch.testing.assert_close(one.targets[:, :N], every.targets[:, :N])
    torch.testing.assert_close(one.targets[:, N], every.targets[:, N:].sum(-1))
    assert one.allowed.tolist() == [True, False, False, True, True, True]


def test_without_background_its_seeds_are_not_used() -> None:
    every, none = choose(), choose(background="none")
    foreground = every.targets[:, :N].sum(-1) > 0.5
    assert torch.equal(none.features, every.features[foreground])
    torch.testing.assert_close(none.targets, every.targets[foreground][:, :N])
    soft = choose(background="none", mode="soft")
    torch.testing.assert_close(soft.targets.sum(-1), torch.ones(72))


def test_regions_and_images_are_unit_means() -> None:
    cams, features, _ = image()
    flat, rounded = cams.flatten(1), features
    best = flat.argmax(0)
    regions = choose(unit="region", mode="seed_hard")
    for row, position in enumerate(range(3)):
        members = (best == position) & (flat.amax(0) >= 0.4)
        expected = F.normalize(rounded[members].mean(0), dim=0)
        torch.testing.assert_close(regions.features[row].float(), expected, atol=1e-3, rtol=0)
        assert regions.targets[row].argmax() == CLASSES[position]
    background = F.normalize(rounded[flat.amax(0) < 0.15].mean(0), dim=0)
    torch.testing.assert_close(regions.features[3].float(), background, atol=1e-3, rtol=0)
    assert regions.targets[3].argmax() >= N
    whole = choose(unit="image", mode="prod")
    assert whole.features.shape == (1, D)
    torch.testing.assert_close(
        whole.features[0].float(),
        F.normalize(rounded[flat.amax(0) >= 0.4].mean(0), dim=0),
        atol=1e-3,
        rtol=0,
    )
    assert set(whole.targets[0].nonzero()[:, 0].tolist()) == set(CLASSES)
    decided = choose(unit="image", mode="seed_hard")
    assert decided.targets[0].argmax() == whole.targets[0].argmax()
    assert choose(unit="image", mode="soft").targets[0, N:].sum() > 0


def test_balance() -> None:
    found = choose(balance="image")
    assert float(found.weights.sum()) == pytest.approx(1)
    columns = Columns(N, M)
    weights = inverse_class_frequency(torch.tensor([10, 20, 0, 40, 5]), num_images=50, columns=columns)
    assert weights[1] / weights[3] == pytest.approx(2)
    assert weights[2] / weights[0] == pytest.approx(10)
    assert weights[N] == weights[N + 2] == pytest.approx(float(weights[0]) / 5)
    balanced = choose(balance="class", class_weights=weights)
    torch.testing.assert_close(balanced.weights, weights[balanced.targets.argmax(-1)])
    with pytest.raises(ConfigurationError, match="class_weights"):
        choose(balance="class")


def test_the_cap_is_random_seeded_and_independent_of_order() -> None:
    every, some = choose(mode="soft"), choose(mode="soft", max_pixels_per_image=20)
    kept = keep_smallest(every.priorities, 20)
    assert torch.equal(some.features, every.features[kept])
    torch.testing.assert_close(some.targets, every.targets[kept])
    other = choose(mode="soft", max_pixels_per_image=20, key="b")
    assert not torch.equal(other.features, some.features)
    assert torch.equal(choose(mode="soft", max_pixels_per_image=20).features, some.features)


@settings(max_examples=30, deadline=None)
@given(key=st.text("abc_0", max_size=8), seed=st.integers(0, 2**63), count=st.integers(0, 300))
def test_priorities_are_reproducible_and_nested(key: str, seed: int, count: int) -> None:
    priorities = pixel_priorities(key, count, seed=seed)
    assert torch.equal(priorities, pixel_priorities(key, count, seed=seed))
    assert priorities.shape == (count,)
    kept = keep_smallest(priorities, count // 2)
    assert torch.equal(kept, kept.sort().values)
    rest = torch.ones(count, dtype=torch.bool)
    rest[kept] = False
    if len(kept):
        assert not rest.any() or priorities[kept].max() <= priorities[rest].min()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["soft", "hardened", "seed_hard", "seeded_soft", "prod", "avg"]),
    background=st.sampled_from(["learn_all", "learn_one", "text", "none"]),
    unit=st.sampled_from(["pixel", "region", "image"]),
    tau=st.sampled_from([0.001, 0.01, 0.5]),
)
def test_targets_are_always_distributions(
    seed: int, mode: str, background: str, unit: str, tau: float
) -> None:
    found = choose(seed, mode=mode, background=background, unit=unit, tau_text=tau)
    assert len(found.features) > 0
    assert bool((found.targets >= 0).all())
    torch.testing.assert_close(found.targets.sum(-1), torch.ones(len(found.targets)))
    assert not found.targets[:, ~found.allowed].any()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(3)))
def test_the_order_of_labels_does_not_matter(order: list[int]) -> None:
    cams, features, text = image()
    config = TargetConfig(tau_text=0.2, mode="seeded_soft")
    found = select_pixels(
        cams[order], features, text, torch.tensor(CLASSES)[order], num_foreground=N, config=config
    )
    torch.testing.assert_close(found.targets, choose(mode="seeded_soft").targets)


def test_maps_that_fit_nothing_are_refused() -> None:
    cams, features, text = image()
    for wrong_cams, classes in ((cams[:, :4], CLASSES), (cams, [0]), (cams[:0], [])):
        with pytest.raises(DataError, match="'xyz'"):
            select_pixels(
                wrong_cams,
                features,
                text,
                torch.tensor(classes, dtype=torch.int64),
                num_foreground=N,
                config=TargetConfig(),
                key="xyz",
            )


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "hard"},
        {"seed_threshold": 1.5},
        {"background_threshold": 0.5},
        {"harden_above": -1},
        {"restrict": "none"},
        {"tau_text": 0},
        {"background": "one"},
        {"unit": "patch"},
        {"balance": "pixel"},
        {"max_pixels_per_image": 0},
        {"sinkhorn_rounds": -1},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=f"targets.{next(iter(wrong))}"):
        TargetConfig(**wrong)


def test_rows_expand_to_unit_prototypes_of_every_class() -> None:
    _, _, text = image()
    for background, rows in (("learn_all", 8), ("learn_one", 6), ("text", 8), ("none", 5)):
        columns = Columns(N, M, background)
        assert columns.rows == len(columns.offsets) == len(columns.learnt) == rows
        assert columns.reduce(text).shape == (rows, D)
        expanded = columns.expand(columns.reduce(text), text)
        torch.testing.assert_close(expanded[:N], text[:N])
        torch.testing.assert_close(expanded.norm(dim=-1), torch.ones(8))
        if background == "learn_one":
            torch.testing.assert_close(expanded[N], F.normalize(text[N:].mean(0), dim=0))
            assert torch.equal(expanded[N], expanded[N + 2])
        else:
            torch.testing.assert_close(expanded, text)
    assert Columns(N, 0, "learn_one").rows == N


def test_gaps_and_shift_equal_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(50, D, generator=generator), dim=-1)
    owners = torch.randint(0, 4, (50,), generator=generator)
    prototypes = F.normalize(torch.randn(5, D, generator=generator), dim=-1)
    sums, counts = region_sums(features, F.one_hot(owners, 5).T.bool())
    x, w, y = features.double().numpy(), prototypes.double().numpy(), owners.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert counts.tolist() == [*np.bincount(y, minlength=4).tolist(), 0]
    assert gap_centroid(prototypes, sums, counts) == pytest.approx(
        np.linalg.norm(w[:4] - means, axis=1).mean()
    )
    assert gap_cos(prototypes, sums, counts) == pytest.approx(1 - (x * w[y]).sum(1).mean())
    shifted = w + 0.5 * (x.mean(0) - w.mean(0))
    shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
    np.testing.assert_allclose(modify_gap(prototypes, features.mean(0), step=0.5), shifted, atol=1e-6)
    torch.testing.assert_close(modify_gap(prototypes, features.mean(0), step=0), prototypes)
    with pytest.raises(ConfigurationError, match="step"):
        modify_gap(prototypes, features.mean(0), step=-1)


def test_a_common_vector_is_no_angle_between_centred_prototypes() -> None:
    rows = torch.eye(3, 6)
    shifted = rows + torch.tensor([0.0, 0, 0, 0.4, 0, 0])
    assert angle_between(rows, shifted, centred=True) == pytest.approx(0, abs=1e-5)
    assert angle_between(rows, shifted, centred=False) == pytest.approx(np.degrees(np.arctan(0.4)))

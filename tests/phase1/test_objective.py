"""The objective of phase 1 against autograd in float64, and its identities."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.phase1.conftest import make_objective
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.prototypes import ObjectiveConfig
from vpl_lightning.functional.targets import Selected, TargetConfig, select_pixels

TAU = 0.07


def reference(
    rows: Tensor, parts: list[Selected], *, offsets: Tensor | None = None, restrict: bool = False
) -> Tensor:
    """Weighted mean KL divergence, spelt out in float64."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for part in parts:
        logits = part.features.double() @ rows.T / TAU
        if offsets is not None:
            logits = logits + offsets.double()
        if restrict:
            logits = logits.masked_fill(~part.allowed, -torch.inf)
        student = logits.log_softmax(-1)
        if restrict:
            student = student.masked_fill(~part.allowed, 0)
        divergence = F.kl_div(student, part.targets.double(), reduction="none").sum(-1)
        total = total + (divergence * part.weights.double()).sum()
        weight += float(part.weights.double().sum())
    return total / weight


def soft_parts(clusters, *, seed: int = 0) -> list[Selected]:
    """Images with uneven weights and soft targets over some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in clusters.parts():
        allowed = torch.rand(7, generator=generator) < 0.6
        allowed[0] = True
        logits = torch.randn(len(part.features), 7, generator=generator).masked_fill(~allowed, -torch.inf)
        weights = torch.rand(len(part.features), generator=generator)
        parts.append(part._replace(targets=logits.softmax(-1), weights=weights, allowed=allowed))
    return parts


@pytest.mark.parametrize("restrict", [False, True])
def test_value_and_gradient_equal_autograd_in_float64(clusters, restrict: bool) -> None:
    parts = soft_parts(clusters)
    columns = Columns(5, 2)
    objective = make_objective(
        parts, columns, clusters.text, tau_image=TAU, student_restrict="present" if restrict else "all"
    )
    rows = clusters.text.double().requires_grad_(True)
    expected = reference(rows, parts, restrict=restrict)
    (gradient,) = torch.autograd.grad(expected, rows)
    found = objective.evaluate(rows)
    assert found.value == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)


def test_backward_gives_the_closed_form(clusters) -> None:
    parts = soft_parts(clusters)
    objective = make_objective(parts, Columns(7, 0), clusters.text, tau_image=TAU)
    rows = torch.nn.Parameter(clusters.text.clone())
    loss = objective(rows) * 3
    loss.backward()
    expected = objective.evaluate(rows)
    assert float(loss.detach()) == pytest.approx(3 * expected.value, rel=1e-6)
    torch.testing.assert_close(rows.grad, 3 * expected.gradient.float())


def test_ranks_average_to_the_gradient_over_all_samples(clusters) -> None:
    parts = soft_parts(clusters)
    columns, config = Columns(7, 0), {"tau_image": TAU, "class_level_weight": 0.3}
    whole = make_objective(parts, columns, clusters.text, **config).evaluate(clusters.text)
    shares = [make_objective(part, columns, clusters.text, **config) for part in (parts[:3], parts[3:])]
    joint = shares[0].statistics + shares[1].statistics
    gradients, values = [], []
    for share in shares:
        share.statistics = joint
        share._world_size = 2
        share._all_reduce = lambda value: values.append(value) or value
        rows = clusters.text.double().requires_grad_(True)
        share(rows).backward()
        gradients.append(rows.grad)
    torch.testing.assert_close(sum(gradients) / 2, whole.gradient, rtol=1e-5, atol=1e-7)
    assert float(sum(values).detach()) == pytest.approx(whole.value, rel=1e-6)


@pytest.mark.parametrize("background", ["learn_all", "learn_one", "text", "none"])
def test_background_modes_equal_autograd_through_the_full_softmax(clusters, background: str) -> None:
    """The expanded prototypes, all C of them in the softmax, give the same value and gradient."""
    columns = Columns(4, 3, background)
    full = clusters.targets if background != "none" else clusters.targets[:, :4]
    keep = full.sum(-1) > 0
    features, targets = clusters.features[keep], columns.reduce_targets(full[keep])
    parts = clusters.parts(features=features, targets=targets)
    objective = make_objective(parts, columns, clusters.text, tau_image=TAU)
    rows = columns.reduce(clusters.text).double().requires_grad_(True)
    every = rows if background == "none" else _repeat(rows, columns)
    logits = features.double() @ every.T / TAU
    mass = logits.softmax(-1)
    if background == "learn_one":
        mass = torch.cat([mass[:, :4], mass[:, 4:].sum(-1, keepdim=True)], dim=1)
    expected = F.kl_div(mass.log(), targets.double(), reduction="batchmean")
    (gradient,) = torch.autograd.grad(expected, rows)
    gradient[~columns.learnt] = 0
    found = objective.evaluate(rows)
    assert found.value == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)


def _repeat(rows: Tensor, columns: Columns) -> Tensor:
    if columns.background != "learn_one":
        return rows
    return torch.cat([rows[:4], rows[4:].expand(columns.num_background, -1)])


def test_class_level_term_equals_autograd(clusters) -> None:
    parts = clusters.parts()
    plain = make_objective(parts, Columns(7, 0), clusters.text, tau_image=TAU)
    both = make_objective(parts, Columns(7, 0), clusters.text, tau_image=TAU, class_level_weight=0.4)
    rows = F.normalize(torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    rows.requires_grad_(True)
    text = clusters.text.double()
    term = F.kl_div(
        (rows @ rows.T / TAU).log_softmax(-1), (text @ text.T / 0.01).softmax(-1), reduction="batchmean"
    )
    (gradient,) = torch.autograd.grad(0.4 * term, rows)
    a, b = plain.evaluate(rows), both.evaluate(rows)
    assert b.value - a.value == pytest.approx(0.4 * float(term.detach()), rel=1e-6)
    torch.testing.assert_close(b.gradient - a.gradient, gradient)


def test_zero_gradient_identity(clusters) -> None:
    """Soft targets, equal temperatures, prototypes at text: nothing to learn."""
    config = TargetConfig(mode="soft", restrict="all", tau_text=0.01)
    cams = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0))
    part = select_pixels(
        cams,
        clusters.features.float(),
        clusters.text,
        torch.tensor([3, 0, 2]),
        num_foreground=5,
        config=config,
    )
    same = make_objective([part], Columns(5, 2), clusters.text, tau_image=0.01)
    found = same.evaluate(clusters.text)
    assert abs(found.value) < 1e-5
    assert float(found.gradient.abs().max()) < 1e-5
    other = make_objective([part], Columns(5, 2), clusters.text, tau_image=0.03)
    assert float(other.evaluate(clusters.text).gradient.abs().max()) > 1e-2


def test_chunks_do_not_matter(clusters) -> None:
    parts = soft_parts(clusters)
    found = [
        make_objective(parts, Columns(7, 0), clusters.text, chunk_images=images).evaluate(clusters.text)
        for images in (1, 3, 10)
    ]
    for other in found[1:]:
        assert other.value == pytest.approx(found[0].value, rel=1e-13)
        torch.testing.assert_close(other.gradient, found[0].gradient, rtol=1e-12, atol=1e-14)


def test_threads_do_not_matter_and_stay_as_many(clusters) -> None:
    before = torch.get_num_threads()
    objective = make_objective(clusters.parts(), Columns(5, 2), clusters.text, chunk_images=1)
    found = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found[threads] = objective.evaluate(clusters.text.double())
            with ThreadPoolExecutor(1) as pool:
                assert {torch.get_num_threads(), pool.submit(torch.get_num_threads).result()} == {threads}
    finally:
        torch.set_num_threads(before)
    assert found[1].value == found[3].value
    assert torch.equal(found[1].gradient, found[3].gradient)


def test_images_of_few_samples_are_summed_by_chunk(clusters) -> None:
    pieces = [
        part._replace(
            **{name: getattr(part, name)[start : start + 9] for name in ("features", "targets", "weights")}
        )
        for part in soft_parts(clusters)
        for start in range(0, 90, 9)
    ]
    whole = make_objective(soft_parts(clusters), Columns(7, 0), clusters.text).evaluate(clusters.text)
    found = make_objective(pieces, Columns(7, 0), clusters.text).evaluate(clusters.text)
    assert found.value == pytest.approx(whole.value, rel=1e-6)
    torch.testing.assert_close(found.gradient, whole.gradient, rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(7)), restrict=st.sampled_from(["all", "present"]))
def test_permuting_the_classes_permutes_the_gradient(clusters, order: list[int], restrict: str) -> None:
    parts = soft_parts(clusters)
    index = torch.tensor(order)
    moved = [part._replace(targets=part.targets[:, index], allowed=part.allowed[index]) for part in parts]
    a = make_objective(parts, Columns(7, 0), clusters.text, student_restrict=restrict)
    b = make_objective(moved, Columns(7, 0), clusters.text[index], student_restrict=restrict)
    torch.testing.assert_close(
        b.evaluate(clusters.text[index]).gradient,
        a.evaluate(clusters.text).gradient[index],
        atol=1e-6,
        rtol=1e-5,
    )


def test_starting_points(clusters) -> None:
    parts = clusters.parts()
    columns = Columns(5, 2, "text")

    def start(init: str) -> Tensor:
        return make_objective(parts, columns, clusters.text, init=init).initial(seed=4)

    torch.testing.assert_close(start("text"), clusters.text.double())
    of_two = clusters.features.double()[clusters.targets[:, 2] == 1].mean(0)
    torch.testing.assert_close(start("masked_mean")[2], F.normalize(of_two, dim=0))
    assert not start("zeros")[:5].any()
    torch.testing.assert_close(start("zeros")[5:], clusters.text[5:].double())
    torch.testing.assert_close(start("random").norm(dim=-1), torch.ones(7, dtype=torch.float64))
    assert not torch.equal(
        start("random")[:5], make_objective(parts, columns, clusters.text, init="random").initial(seed=5)[:5]
    )


def test_no_pixel_at_all_is_an_error(clusters) -> None:
    part = clusters.parts()[0]
    empty = part._replace(features=part.features[:0], targets=part.targets[:0], weights=torch.ones(0))
    with pytest.raises(DataError, match="seed_threshold"):
        make_objective([empty], Columns(7, 0), clusters.text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau_image": 0},
        {"tau_text": -1},
        {"class_level_weight": -1},
        {"init": "mean"},
        {"student_restrict": "no"},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ObjectiveConfig(**wrong)

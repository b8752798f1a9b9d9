"""Solvers of phase 1: single steps against autograd, convergence, exact resuming."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.phase1.conftest import Clusters, make_objective
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.gap import angle_between
from vpl_lightning.functional.lbfgs import SphereLBFGS
from vpl_lightning.functional.prototypes import ObjectiveConfig, PrototypeObjective
from vpl_lightning.functional.recipe import PRESETS, PrototypeRecipe, SolverConfig, solve
from vpl_lightning.functional.solvers import ProjectedGradient, PrototypeSolver
from vpl_lightning.functional.targets import TargetConfig

CHOICES = [
    SolverConfig(steps=40, halving="tangential"),
    SolverConfig(steps=40, halving="objective"),
    SolverConfig(steps=40, halving="raw"),
    SolverConfig(name="lbfgs", steps=20),
]


@pytest.fixture(scope="module")
def objective(clusters) -> PrototypeObjective:
    return make_objective(clusters.parts(), Columns(7, 0), clusters.text)


def closure_of(objective: PrototypeObjective, solver: PrototypeSolver, rows: Tensor):
    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective(rows)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("projection", ["sphere", "ball"])
def test_a_step_equals_autograd(clusters, objective: PrototypeObjective, projection: str) -> None:
    start = clusters.text.double().requires_grad_(True)
    loss = F.cross_entropy(clusters.features.double() @ start.T / 0.1, clusters.targets.double())
    (gradient,) = torch.autograd.grad(loss, start)
    moved = start.detach() - 0.5 * gradient
    expected = F.normalize(moved, dim=-1) if projection == "sphere" else moved
    if projection == "ball":
        lengths = moved.norm(dim=-1, keepdim=True)
        expected = torch.where(lengths > 0.9, 0.9 * moved / lengths, moved)
    rows = nn.Parameter(clusters.text.double())
    solver = ProjectedGradient([rows], 0.5, projection=projection, radius=0.9, halving="none")
    solver.step(closure_of(objective, solver, rows))
    torch.testing.assert_close(rows.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CHOICES, ids=lambda config: f"{config.name}-{config.halving}")
def test_rows_stay_unit_and_the_objective_falls(objective: PrototypeObjective, config: SolverConfig) -> None:
    found = solve(objective, config)
    torch.testing.assert_close(found.rows.norm(dim=-1), torch.ones(7, dtype=torch.float64))
    assert found.objective == pytest.approx(objective.evaluate(found.rows).value, rel=1e-6)
    assert found.objective < objective.evaluate(objective.initial()).value - 0.05


def test_inmap_rule_follows_inmap(clusters, objective: PrototypeObjective) -> None:
    """Halve where the whole gradient grew, keep the step, project: a plain transcription in float64."""
    text, x, targets = clusters.text.double(), clusters.features.double(), clusters.targets.double()
    rows, lr, previous, count = text, 10.0, float("inf"), len(x)
    for _ in range(15):
        gradient = ((x @ rows.T / 0.1).softmax(-1) - targets).T @ x
        if gradient.norm() > previous:
            lr /= 2
        previous = float(gradient.norm())
        rows = F.normalize(rows - lr / (count * 0.1) * gradient, dim=-1)
    found = solve(objective, SolverConfig(steps=15, halving="raw"))
    torch.testing.assert_close(found.rows, rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tau", "count"), [(0.1, 800), (0.05, 800), (0.1, 2000)])
def test_the_default_rule_comes_to_rest_at_a_solution(tau: float, count: int) -> None:
    """Where the gradient's whole norm grows on the way down, InMaP's rule stops early."""
    data = many_classes(count)
    objective = make_objective(data.parts(), Columns(20, 0), data.text, tau_image=tau)
    ends: dict[str, tuple[float, float, float]] = {}
    for rule in ("objective", "raw"):

        def record(solver: PrototypeSolver, rule: str = rule) -> None:
            ends[rule] = (solver.objective, solver.measure, solver.param_groups[0]["lr"])

        solve(objective, SolverConfig(steps=250, halving=rule), after_step=record)
    (objective_new, measure_new, lr_new), (objective_raw, measure_raw, lr_raw) = ends.values()
    assert lr_raw < 1e-6
    assert lr_new > 1e-2
    assert measure_new < measure_raw / 3
    assert objective_new < objective_raw


def many_classes(count: int) -> Clusters:
    """Twenty classes on a common cone in 64 dimensions, a fifth of the targets wrong."""
    generator = torch.Generator().manual_seed(0)
    cone = torch.randn(64, generator=generator)
    centres = F.normalize(torch.randn(20, 64, generator=generator) / 2 + cone, dim=-1)
    classes = torch.randint(0, 20, (count,), generator=generator)
    noise = torch.randn(count, 64, generator=generator) * 0.9 / 8
    features = F.normalize(centres[classes] + noise, dim=-1).half()
    text = F.normalize(0.3 * centres + torch.randn(20, 64, generator=generator) / 8, dim=-1)
    wrong = torch.rand(count, generator=generator) < 0.2
    told = torch.where(wrong, torch.randint(0, 20, (count,), generator=generator), classes)
    return Clusters(features, text, F.one_hot(told, 20).float())


def test_curvature_saves_passes() -> None:
    data = many_classes(800)
    statistics = make_objective(data.parts(), Columns(20, 0), data.text).statistics
    x, mass = data.features.double(), data.targets.double().sum(0)
    moments = x.T @ x * 64 / x.square().sum() + 3.0 * torch.eye(64)
    expected = torch.linalg.solve(moments, data.text.double().T).T / (mass / mass.mean() + 0.2)[:, None]
    torch.testing.assert_close(
        statistics.curvature().divide(data.text.double()), expected, rtol=1e-4, atol=1e-4
    )

    found = {}
    for preconditioned in (False, True):
        objective = make_objective(data.parts(), Columns(20, 0), data.text, tau_image=0.03)
        rows = nn.Parameter(objective.initial())
        solver = SphereLBFGS([rows])
        if preconditioned:
            solver.precondition(statistics.curvature())
        for _ in range(20):
            solver.step(closure_of(objective, solver, rows))
        found[preconditioned] = solver.objective
    assert found[True] < found[False] - 0.02


@pytest.mark.parametrize("tau", [0.1, 0.03])
def test_lbfgs_reaches_the_objective_of_gradient_descent_in_sixty_passes(clusters, tau: float) -> None:
    objective = make_objective(clusters.parts(), Columns(7, 0), clusters.text, tau_image=tau)
    descent = solve(objective, SolverConfig(steps=1500))
    passes: list[tuple[int, float]] = []
    found = solve(
        objective,
        SolverConfig(name="lbfgs", steps=60),
        after_step=lambda solver: passes.append((solver.passes, solver.objective)),
    )
    within = min(value for count, value in passes if count <= 60)
    assert within <= descent.objective + 1e-6
    if tau == 0.1:
        assert angle_between(found.rows, descent.rows, centred=True) < 0.1


def test_zero_rows_are_left_where_nothing_pulls_at_them(clusters) -> None:
    keep = clusters.targets[:, 6] == 0
    allowed = torch.tensor([True] * 6 + [False])
    parts = clusters.parts(features=clusters.features[keep], targets=clusters.targets[keep])
    parts = [part._replace(allowed=allowed) for part in parts]
    objective = make_objective(parts, Columns(7, 0), clusters.text, init="zeros", student_restrict="present")
    found = solve(objective, SolverConfig(steps=30))
    assert not found.rows[6].any()
    torch.testing.assert_close(found.rows[:6].norm(dim=-1), torch.ones(6, dtype=torch.float64))
    expanded = Columns(7, 0).expand(found.rows, clusters.text)
    torch.testing.assert_close(expanded[6], clusters.text[6])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(7)))
def test_permuting_the_classes_permutes_the_solution(clusters, order: list[int]) -> None:
    index = torch.tensor(order)
    plain = make_objective(clusters.parts(), Columns(7, 0), clusters.text)
    other = make_objective(
        clusters.parts(targets=clusters.targets[:, index]), Columns(7, 0), clusters.text[index]
    )
    config = SolverConfig(steps=60)
    torch.testing.assert_close(
        solve(other, config).rows, solve(plain, config).rows[index], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("config", CHOICES, ids=lambda config: f"{config.name}-{config.halving}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_repeats_the_uninterrupted_one(
    clusters, objective: PrototypeObjective, config: SolverConfig, dtype: torch.dtype, tmp_path
) -> None:
    rows = nn.Parameter(clusters.text.to(dtype))
    solver = config.build([rows])
    for _ in range(6):
        solver.step(closure_of(objective, solver, rows))
    torch.save({"solver": solver.state_dict(), "rows": rows.detach()}, tmp_path / "state.pt")
    for _ in range(6):
        solver.step(closure_of(objective, solver, rows))

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = nn.Parameter(state["rows"])
    resumed = config.build([again])
    resumed.load_state_dict(state["solver"])
    for _ in range(6):
        resumed.step(closure_of(objective, resumed, again))
    assert torch.equal(again, rows)
    assert (resumed.passes, resumed.objective) == (solver.passes, solver.objective)


@pytest.mark.parametrize("config", CHOICES, ids=lambda config: f"{config.name}-{config.halving}")
def test_chunks_do_not_change_the_prototypes(clusters, config: SolverConfig) -> None:
    found = [
        solve(make_objective(clusters.parts(), Columns(7, 0), clusters.text, chunk_images=images), config)
        for images in (1, 4)
    ]
    torch.testing.assert_close(found[0].rows, found[1].rows, atol=1e-10, rtol=0)


def test_the_step_size_has_a_floor(objective: PrototypeObjective) -> None:
    rates: list[float] = []
    solve(
        objective,
        SolverConfig(steps=60, lr_floor=3.0),
        after_step=lambda solver: rates.append(solver.param_groups[0]["lr"]),
    )
    assert rates[-1] == 3.0


def test_a_search_without_success_leaves_the_rows_alone(clusters) -> None:
    rows = nn.Parameter(clusters.text.double())
    solver, before = SphereLBFGS([rows]), F.normalize(rows.detach(), dim=-1)
    values = iter([1.0, float("nan"), float("inf"), *range(2, 40)])

    def closure() -> float:
        rows.grad = torch.ones_like(rows)
        return next(values)

    solver.step(closure)
    torch.testing.assert_close(rows.detach(), before)
    assert (solver.objective, solver.passes) == (1.0, 9)


def test_solvers_on_a_plain_quadratic() -> None:
    """Bowls of very different width: both reach the nearest unit rows."""
    goal = F.normalize(
        torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    widths = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)[:, None]
    for config in (SolverConfig(lr=0.9, steps=300), SolverConfig(name="lbfgs", steps=40)):
        rows = nn.Parameter(F.normalize(goal + 0.5, dim=-1))
        solver = config.build([rows])

        def closure(rows: nn.Parameter = rows, solver: PrototypeSolver = solver) -> Tensor:
            solver.zero_grad()
            loss = ((rows - goal).square() / widths).sum()
            loss.backward()
            return loss

        for _ in range(config.steps):
            solver.step(closure)
        torch.testing.assert_close(rows.detach(), goal, atol=1e-3, rtol=0)


def test_solver_refuses_what_it_cannot_do(clusters, objective: PrototypeObjective) -> None:
    with pytest.raises(ConfigurationError, match="one parameter"):
        ProjectedGradient([nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))])
    rows = nn.Parameter(clusters.text)
    with pytest.raises(ConfigurationError, match="backward"):
        ProjectedGradient([rows]).step(lambda: objective(rows))
    for wrong in ({"lr": 0.0}, {"halving": "yes"}, {"projection": "cube"}, {"radius": -1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            ProjectedGradient([rows], **wrong)
    with pytest.raises(ConfigurationError, match="memory"):
        SphereLBFGS([rows], memory=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adam"},
        {"steps": 0},
        {"name": "lbfgs", "projection": "ball"},
        {"lr": -1.0},
        {"memory": 0},
        {"lr_floor": -1},
    ],
)
def test_wrong_solver_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        SolverConfig(**wrong)


def test_recipes() -> None:
    assert PrototypeRecipe.preset() == PrototypeRecipe() == PRESETS["default"]
    assert PrototypeRecipe().scale() == pytest.approx(10)
    paper = PrototypeRecipe.preset("paper")
    assert (paper.scale(), paper.objective.tau_image, paper.solver.steps) == (100, 0.03, 3000)
    assert (paper.targets.seed_threshold, paper.targets.tau_text, paper.solver.lr) == (0.4, 0.01, 10)
    with pytest.raises(ConfigurationError, match="default, paper"):
        PrototypeRecipe.preset("best")
    with pytest.raises(ConfigurationError, match="student_restrict"):
        PrototypeRecipe(
            targets=TargetConfig(restrict="all"), objective=ObjectiveConfig(student_restrict="present")
        )
    for wrong in ({"features": "raw"}, {"seeds": "final"}, {"cam_scale": 0.0}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            PrototypeRecipe(**wrong)

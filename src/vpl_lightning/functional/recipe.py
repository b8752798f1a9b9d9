"""The settings of phase 1 in one place, two named sets of them, and the plain loop that solves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.gap import modify_gap
from vpl_lightning.functional.lbfgs import SphereLBFGS
from vpl_lightning.functional.prototypes import ObjectiveConfig, PrototypeObjective
from vpl_lightning.functional.solvers import (
    Halving,
    ProjectedGradient,
    Projection,
    PrototypeSolver,
    Standstill,
    check_descent,
)
from vpl_lightning.functional.targets import TargetConfig

Source = Literal["learnt", "modify_gap", "text"]

CLIP_SCALE = 100.0
"""Factor of the cosines in CLIP's own softmax, one over its temperature of 0.01."""


class Descent(Protocol):
    """What a loop over optimiser steps asks of its settings."""

    @property
    def steps(self) -> int:
        """How many."""

    def build(self, params: Iterable[Tensor]) -> PrototypeSolver:
        """Return the optimiser of one parameter."""


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Which solver, and how long.

    Attributes:
        name: ``pgd`` (:class:`ProjectedGradient`, the paper's) or ``lbfgs`` (:class:`SphereLBFGS`).
        steps: Solver steps. The paper takes 3,000 of ``pgd``; 300 measured the same in our trials. A step of
            ``lbfgs`` takes one pass over the data, now and then more.
        lr: First step size of ``pgd``; the paper's.
        halving: Rule of ``pgd``.
        lr_floor: Of ``pgd``.
        projection: Of ``pgd``.
        radius: Of ``pgd`` with ``projection="ball"``.
        memory: Curvature pairs of ``lbfgs``.
    """

    name: Literal["pgd", "lbfgs"] = "pgd"
    steps: int = 300
    lr: float = 10.0
    halving: Halving = "objective"
    lr_floor: float = 0.0
    projection: Projection = "sphere"
    radius: float = 1.0
    memory: int = 40

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.name not in ("pgd", "lbfgs"):
            raise ConfigurationError(f"solver.name={self.name!r}: choose pgd or lbfgs")
        if self.steps < 1:
            raise ConfigurationError(f"solver.steps={self.steps} must be at least 1")
        if self.name == "lbfgs" and self.projection != "sphere":
            raise ConfigurationError(
                "solver.name='lbfgs' works on the sphere: drop solver.projection or take pgd"
            )
        if self.memory < 1:
            raise ConfigurationError(f"solver.memory={self.memory} must be at least 1")
        check_descent(
            lr=self.lr,
            halving=self.halving,
            lr_floor=self.lr_floor,
            projection=self.projection,
            radius=self.radius,
        )

    def build(self, params: Iterable[Tensor]) -> PrototypeSolver:
        """Return the optimiser of one parameter."""
        if self.name == "lbfgs":
            return SphereLBFGS(params, memory=self.memory)
        return ProjectedGradient(
            params,
            self.lr,
            halving=self.halving,
            lr_floor=self.lr_floor,
            projection=self.projection,
            radius=self.radius,
        )


@dataclass(frozen=True, kw_only=True)
class PrototypeRecipe:
    """Everything that decides what phase 1 makes of given images and maps.

    Attributes:
        source: Where the prototypes come from, the rows of the paper's Table 4: ``learnt`` (VPL);
            ``modify_gap``, text moved by the difference of the mean feature and the mean text prototype
            (Liang et al., :func:`modify_gap`); or ``text`` as it is. The last two take no solver step.
        features: Dense features: the last block's ``value`` path, its ``final`` output, or ``penultimate``.
        seeds: Whether seeds come from ``raw`` or ``refined`` maps.
        targets: Which pixels, and what they are told.
        objective: What is minimised.
        solver: How.
        cam_scale: Factor of the cosines when maps are made with the prototypes; None for one over
            ``objective.tau_image`` if they are learnt, and for the scale of text otherwise.
        seed: Of every random choice.
    """

    source: Source = "learnt"
    features: Literal["value", "final", "penultimate"] = "value"
    seeds: Literal["raw", "refined"] = "refined"
    targets: TargetConfig = field(default_factory=TargetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    cam_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse contradictory settings."""
        for key, known in {
            "source": get_args(Source),
            "features": ("value", "final", "penultimate"),
            "seeds": ("raw", "refined"),
        }.items():
            if getattr(self, key) not in known:
                raise ConfigurationError(f"{key}={getattr(self, key)!r}: choose one of {', '.join(known)}")
        if self.cam_scale is not None and not self.cam_scale > 0:
            raise ConfigurationError(
                f"cam_scale={self.cam_scale} must be positive, or null for 1 / tau_image"
            )
        if self.objective.student_restrict == "present" and self.targets.restrict == "all":
            raise ConfigurationError(
                "objective.student_restrict='present' with targets.restrict='all' asks for classes that the "
                "student cannot answer: set targets.restrict='present'"
            )

    @property
    def steps(self) -> int:
        """Steps of the optimiser; one, which evaluates, where nothing is learnt."""
        return self.solver.steps if self.source == "learnt" else 1

    def scale(self, text_scale: float = CLIP_SCALE) -> float:
        """Return the factor of the cosines when maps are made with the prototypes.

        Args:
            text_scale: Factor that goes with text.
        """
        return self.cam_scale or (1 / self.objective.tau_image if self.source == "learnt" else text_scale)

    def build(self, params: Iterable[Tensor]) -> PrototypeSolver:
        """Return the optimiser of the prototypes, which stands still where nothing is learnt."""
        return self.solver.build(params) if self.source == "learnt" else Standstill(params)

    def start(self, objective: PrototypeObjective) -> Float[Tensor, "R D"]:
        """Return the rows to start from, float64; those that are not learnt are the outcome."""
        if self.source == "learnt":
            return objective.initial(seed=self.seed)
        text = objective.text.cpu()
        if self.source == "text":
            return text
        moved = modify_gap(text, objective.statistics.mean_feature.cpu())
        return torch.where(objective.columns.learnt[:, None], moved, text)

    @classmethod
    def preset(cls, name: Literal["default", "paper"] = "default") -> PrototypeRecipe:
        """Return a named set of settings.

        ``default``: what our measurements favour, value-path features, text softmax times seed mask, tau_I
        0.1. ``paper``: the paper's printed values, and where it is silent what CLIP-ES and InMaP do: features
        after the last block, seeds from raw maps at Phi 0.4, tau_I 0.03, 3,000 steps, CLIP's own scale of 100
        for the maps.

        Raises:
            ConfigurationError: If the name is unknown.
        """
        if name not in PRESETS:
            raise ConfigurationError(f"recipe {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS = {
    "default": PrototypeRecipe(),
    "paper": PrototypeRecipe(
        features="final",
        seeds="raw",
        targets=TargetConfig(mode="seeded_soft", background_threshold=0.1),
        objective=ObjectiveConfig(tau_image=0.03),
        solver=SolverConfig(steps=3000),
        cam_scale=CLIP_SCALE,
    ),
}
"""Named settings of phase 1."""


class Solution(NamedTuple):
    """What a solver found."""

    rows: Float[Tensor, "R D"]
    """Float64; see :meth:`Columns.expand`."""
    objective: float
    passes: int
    history: list[float]
    """Objective after each step."""


def solve(
    objective: PrototypeObjective,
    config: Descent,
    *,
    start: Float[Tensor, "R D"] | None = None,
    seed: int = 0,
    after_step: Callable[[PrototypeSolver], None] | None = None,
) -> Solution:
    """Minimise the objective in a plain loop.

    Args:
        objective: What.
        config: How; a :class:`SolverConfig` or a :class:`PrototypeRecipe`.
        start: Where from; :meth:`PrototypeObjective.initial` if None.
        seed: Of a random start.
        after_step: Called with the solver after each step, for progress.
    """
    rows = (objective.initial(seed=seed) if start is None else start).detach().double().clone()
    rows.requires_grad_(True)
    solver = config.build([rows])
    solver.precondition(objective.statistics.curvature())

    def closure() -> float:
        evaluation = objective.evaluate(rows)
        rows.grad = evaluation.gradient
        return evaluation.value

    history = []
    for _ in range(config.steps):
        solver.step(closure)
        history.append(solver.objective)
        if after_step is not None:
            after_step(solver)
    return Solution(rows.detach(), solver.objective, solver.passes, history)

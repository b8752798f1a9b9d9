"""Solvers of phase 1 as optimisers: the same class serves a plain loop, the plug-in and Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.prototypes import PrototypeObjective

Halving = Literal["tangential", "objective", "raw", "none"]
Projection = Literal["sphere", "ball"]
Closure = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How the objective is minimised.

    Attributes:
        name: ``pgd``: projected gradient descent, the paper's; ``lbfgs``: limited-memory BFGS on the sphere, far fewer
            passes over the data.
        steps: Steps, T_w of the paper (3,000); with halving, 300 reach the same point on what we measured.
        lr: Step size on the mean loss (paper: 10). Not used by ``lbfgs``.
        halving: What must not grow from one step to the next, else the step size is halved for good: the norm of the
            gradient's tangential part, the objective, or the raw norm (InMaP's rule, which stalls on the sphere because
            the radial part never vanishes).
        min_lr: The step size is never halved below this.
        projection: Onto the unit sphere (InMaP, Theorem 1), or into the unit ball (Theorem 2).
        history: Pairs that ``lbfgs`` remembers.
    """

    name: Literal["pgd", "lbfgs"] = "pgd"
    steps: int = 300
    lr: float = 10.0
    halving: Halving = "tangential"
    min_lr: float = 0.0
    projection: Projection = "sphere"
    history: int = 10

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.steps < 1:
            raise ConfigurationError(f"solver.steps={self.steps} must be at least 1; the paper takes 3000")
        if self.lr <= 0 or self.min_lr < 0:
            raise ConfigurationError(
                f"solver.lr={self.lr} must be positive and solver.min_lr={self.min_lr} not negative"
            )
        if self.name == "lbfgs" and self.projection == "ball":
            raise ConfigurationError(
                "solver.projection=ball: lbfgs works on the sphere; choose solver.name=pgd"
            )


class ProjectedGradientDescent(Optimizer):
    """``W <- project(W - lr * gradient)`` (equation 11), the step size halved when the measure grows.

    The step size and the last measure are in the state, so that an interrupted run goes on exactly.

    Args:
        params: Prototypes, unit rows.
        lr: First step size.
        halving: See :class:`SolverConfig`.
        min_lr: See :class:`SolverConfig`.
        projection: See :class:`SolverConfig`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 10.0,
        halving: Halving = "tangential",
        min_lr: float = 0.0,
        projection: Projection = "sphere",
    ) -> None:
        defaults = {"lr": lr, "halving": halving, "min_lr": min_lr, "projection": projection}
        super().__init__(params, defaults)

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step: one pass over the data."""
        if closure is None:
            raise ConfigurationError("projected gradient descent needs a closure that computes the objective")
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for rows in group["params"]:
                    if rows.grad is not None:
                        self._move(rows, group, loss)
        return loss

    def _move(self, rows: Tensor, group: dict[str, Any], loss: Tensor) -> None:
        state = self.state[rows]
        measure = self._measure(rows, group["halving"], loss)
        if "measure" in state and measure > state["measure"]:
            group["lr"] = max(group["lr"] / 2, group["min_lr"])
        state["measure"] = measure
        moved = rows - group["lr"] * rows.grad
        if group["projection"] == "sphere":
            rows.copy_(F.normalize(moved, dim=-1))
        else:
            rows.copy_(moved / moved.norm(dim=-1, keepdim=True).clamp(min=1))

    @staticmethod
    def _measure(rows: Tensor, halving: Halving, loss: Tensor) -> Tensor:
        gradient = cast(Tensor, rows.grad)
        if halving == "none":
            return gradient.new_zeros(())
        if halving == "objective":
            return loss.detach()
        if halving == "raw":
            return gradient.norm()
        return tangential(gradient, rows).norm()


class SphereLBFGS(LBFGS):
    """L-BFGS on the directions of the rows: minimises ``f(normalise(V))`` over ``V``.

    The parameter keeps its lengths; normalise it before use. A step is one iteration with its line search.

    Args:
        params: Prototypes, unit rows at first.
        history: Pairs remembered.
    """

    def __init__(self, params: Iterable[Tensor], *, history: int = 10) -> None:
        super().__init__(
            list(params), lr=1.0, max_iter=1, max_eval=8, history_size=history, line_search_fn="strong_wolfe"
        )

    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one iteration."""
        rows = cast(Tensor, self.param_groups[0]["params"][0])

        def on_sphere() -> Tensor:
            free = rows.detach().clone()
            lengths = free.norm(dim=-1, keepdim=True)
            with torch.no_grad():
                rows.copy_(free / lengths)
                with torch.enable_grad():
                    loss = closure()
                gradient = cast(Tensor, rows.grad)
                gradient.copy_(tangential(gradient, rows) / lengths)
                rows.copy_(free)
            return loss

        return super().step(on_sphere)  # type: ignore[no-untyped-call]


def tangential(gradient: Float[Tensor, "R D"], rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
    """Remove from each row of the gradient its part along the row."""
    return gradient - (gradient * rows).sum(-1, keepdim=True) * rows


def make_optimizer(rows: Tensor, config: SolverConfig) -> Optimizer:
    """Build the optimiser that a configuration names."""
    if config.name == "lbfgs":
        return SphereLBFGS([rows], history=config.history)
    return ProjectedGradientDescent(
        [rows], lr=config.lr, halving=config.halving, min_lr=config.min_lr, projection=config.projection
    )


class Solution(NamedTuple):
    """What a solver found."""

    rows: Float[Tensor, "R D"]
    """Unit rows."""
    objectives: list[float]
    """Objective before each step."""
    passes: int
    """Passes over the data."""


def solve(objective: PrototypeObjective, config: SolverConfig, *, seed: int = 0) -> Solution:
    """Minimise an objective in this process alone.

    Args:
        objective: Over all data.
        config: The solver.
        seed: Of a random start.
    """
    rows = objective.start(seed=seed).clone().requires_grad_()
    optimizer = make_optimizer(rows, config)
    before = objective.passes
    objectives: list[float] = []

    def closure() -> Tensor:
        value, rows.grad = objective.evaluate(rows)
        return value.to(rows.dtype)

    for _ in range(config.steps):
        objectives.append(float(optimizer.step(closure)))
    return Solution(F.normalize(rows.detach(), dim=-1), objectives, objective.passes - before)

"""Solvers of phase 1: torch optimisers for Lightning, and the same ones in a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.statistics import Curvature

Halving = Literal["objective", "tangential", "raw", "none"]
Projection = Literal["sphere", "ball"]
Closure = Callable[[], Any]

ROUNDING = 1e-7
"""Change of an objective, relative to itself or to one nat, that float32 products cannot tell from none."""


def check_descent(
    *, lr: float, halving: Halving, lr_floor: float, projection: Projection, radius: float
) -> None:
    """Refuse settings of :class:`ProjectedGradient` that make no sense.

    Raises:
        ConfigurationError: Naming the setting.
    """
    for key, value in (("lr", lr), ("radius", radius)):
        if not value > 0:
            raise ConfigurationError(f"solver.{key}={value} must be positive")
    if lr_floor < 0:
        raise ConfigurationError(f"solver.lr_floor={lr_floor} must not be negative")
    if halving not in get_args(Halving):
        raise ConfigurationError(f"solver.halving={halving!r}: choose one of {', '.join(get_args(Halving))}")
    if projection not in get_args(Projection):
        raise ConfigurationError(
            f"solver.projection={projection!r}: choose one of {', '.join(get_args(Projection))}"
        )


class PrototypeSolver(Optimizer):
    """Base of the solvers: one parameter, the ``(R, D)`` prototypes, and exact resuming.

    ``step(closure)`` leaves the parameter at a point whose objective and gradient are known; they are part of
    the state, in the parameter's own type, so that a resumed run repeats the uninterrupted one. Float64
    prototypes keep rounding out of the solver's decisions; the products of the objective are float32 anyway.
    """

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if len(self.param_groups) != 1 or len(self.param_groups[0]["params"]) != 1:
            raise ConfigurationError("the solvers of phase 1 take one parameter: the matrix of prototypes")

    @property
    def passes(self) -> int:
        """Evaluations of the objective so far."""
        return int(self._state.get("passes", 0))

    @property
    def objective(self) -> float:
        """Objective at the prototypes; nan before the first step."""
        return float(self._state.get("value", math.nan))

    @property
    def measure(self) -> float:
        """Norm of the tangential gradient at the prototypes; nan before the first step."""
        return float(self._state.get("measure", math.nan))

    def precondition(self, curvature: Curvature) -> None:
        """Take note of how curved the objective is; solvers that do not use it pass over it."""

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = self.param_groups[0]["params"][0]
        return parameter

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[self._parameter]
        return state

    def _evaluate(self, closure: Closure) -> tuple[float, Tensor]:
        """Return objective and gradient at the parameter."""
        with torch.enable_grad():
            loss = closure()
        gradient = self._parameter.grad
        if gradient is None or loss is None:
            raise ConfigurationError(
                "the closure of a phase-1 solver must call backward() and return the loss"
            )
        self._state["passes"] = self.passes + 1
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return value, gradient.detach().clone()

    def _settle(self, value: float, gradient: Tensor, measure: float) -> None:
        self._state.update(value=value, gradient=gradient, measure=measure)

    def _loss(self) -> Tensor:
        return torch.tensor(self.objective, dtype=self._parameter.dtype, device=self._parameter.device)


class Standstill(PrototypeSolver):
    """Leaves the prototypes where they are: each step evaluates them, for prototypes that are not learnt."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Evaluate the objective once.

        Args:
            closure: See :meth:`ProjectedGradient.step`.
        """
        value, gradient = self._evaluate(closure)
        self._settle(value, gradient, float(gradient.norm()))
        return self._loss()


class ProjectedGradient(PrototypeSolver):
    """Full-batch projected gradient descent: the paper's solver, in InMaP's form.

    ``prototypes = project(prototypes - lr * gradient)``; the objective is a mean, which is what makes the
    paper's ``lr`` of 10 a sensible number. That number is too large to converge, so the step size is halved,
    for good, whenever a measure gets worse:

    ============== ===================================================================================
    ``objective``  the objective rose or, where float32 cannot tell, the gradient along the sphere grew.
                   The step is taken back as well
    ``tangential`` the gradient along the sphere grew
    ``raw``        the whole gradient grew (InMaP)
    ``none``       never
    ============== ===================================================================================

    InMaP's measure does not vanish at a solution, as the radial part of the gradient does not; it, and to
    some extent its tangential part, can grow on the way down too, and then halve the step size away far from
    a solution. InMaP also keeps the steps that made things worse, and the first ones wander so far that
    rounding decides where the descent ends. Hence the default.

    Args:
        params: The prototypes.
        lr: Step size on the mean objective.
        halving: The rule.
        lr_floor: The step size is not halved below this; steps are then kept whatever they do.
        projection: Onto the unit sphere (InMaP), or into the ball of ``radius`` (the paper's Theorem 2). Rows
            that have no gradient are left alone, zero rows included.
        radius: Of the ball.

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 10.0,
        *,
        halving: Halving = "objective",
        lr_floor: float = 0.0,
        projection: Projection = "sphere",
        radius: float = 1.0,
    ) -> None:
        check_descent(lr=lr, halving=halving, lr_floor=lr_floor, projection=projection, radius=radius)
        defaults = {
            "lr": lr,
            "halving": halving,
            "lr_floor": lr_floor,
            "projection": projection,
            "radius": radius,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Take one step; the first one costs two passes, every other one.

        Args:
            closure: Clears the gradient, computes the loss, calls ``backward()`` and returns the loss.
        """
        parameter, group, state = self._parameter, self.param_groups[0], self._state
        if "gradient" not in state:
            value, gradient = self._evaluate(closure)
            self._settle(value, gradient, self._measure(gradient))
        before = parameter.clone()
        parameter.copy_(self._project(before - group["lr"] * state["gradient"], state["gradient"]))
        value, gradient = self._evaluate(closure)
        measure = self._measure(gradient)
        worse = self._worse(value, gradient, measure)
        may_halve = worse and group["lr"] > group["lr_floor"]
        if may_halve:
            group["lr"] = max(group["lr"] / 2, group["lr_floor"])
        if may_halve and group["halving"] == "objective":
            parameter.copy_(before)
        else:
            self._settle(value, gradient, measure)
        return self._loss()

    def _project(self, moved: Tensor, gradient: Tensor) -> Tensor:
        if self.param_groups[0]["projection"] == "ball":
            radius: float = self.param_groups[0]["radius"]
            shrink: Tensor = radius / moved.norm(dim=-1, keepdim=True).clamp(min=radius)
            return moved * shrink
        still = ~gradient.any(-1, keepdim=True)
        return torch.where(still, moved, F.normalize(moved, dim=-1))

    def _measure(self, gradient: Tensor) -> float:
        """Return the norm of the part of the gradient that the projection leaves."""
        parameter, group = self._parameter.double(), self.param_groups[0]
        gradient = gradient.double()
        length = parameter.norm(dim=-1, keepdim=True)
        outward = parameter / length.clamp(min=torch.finfo(torch.float64).tiny)
        radial = (gradient * outward).sum(-1, keepdim=True)
        if group["projection"] == "ball":
            held = (length >= group["radius"] * (1 - 1e-6)) & (radial < 0)
            radial = torch.where(held, radial, 0.0)
        return float((gradient - radial * outward).norm())

    def _worse(self, value: float, gradient: Tensor, measure: float) -> bool:
        state, rule = self._state, self.param_groups[0]["halving"]
        if rule == "none":
            return False
        if not math.isfinite(value):
            return True
        if rule == "raw":
            return bool(gradient.norm() > state["gradient"].norm())
        grew: bool = measure > state["measure"]
        if rule == "tangential":
            return grew
        rise = value - state["value"]
        slack = ROUNDING * max(1.0, abs(state["value"]))
        return rise > slack or (grew and rise > -slack)

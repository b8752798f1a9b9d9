"""A quasi-Newton solver of phase 1 on the sphere."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.solvers import ROUNDING, Closure, PrototypeSolver
from vpl_lightning.functional.statistics import Curvature

SUFFICIENT_DECREASE = 1e-4
"""Armijo's constant, the share of the first-order decrease that a step must reach (Nocedal and Wright)."""
CURVATURE = 0.9
"""Share of the first slope that the slope at an accepted point may keep (Nocedal and Wright)."""
LONGEST_TURN = 1.0
"""Radians by which a trial may turn a prototype."""
MAX_TRIALS = 8
"""Evaluations of one line search."""


class SphereLBFGS(PrototypeSolver):
    """Limited-memory BFGS for unit rows: the objective of thousands of gradient steps in tens of passes.

    Directions live in the tangent space, steps are retracted by normalising, and older curvature pairs are
    carried along by projection (Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds).
    A step of length one is tried first and shortened by cubic interpolation until the objective falls enough.
    The prototypes that it finds differ from those of gradient descent by a common vector that no softmax
    sees (:func:`angle_between`); a small step size brings gradient descent to the same ones.

    Args:
        params: The prototypes, unit rows.
        memory: Curvature pairs kept.

    Raises:
        ConfigurationError: If the memory is not positive.
    """

    def __init__(self, params: Iterable[Tensor], *, memory: int = 40) -> None:
        if memory < 1:
            raise ConfigurationError(f"memory={memory} must be at least 1")
        super().__init__(params, {"memory": memory})
        self._curvature: Curvature | None = None

    def precondition(self, curvature: Curvature) -> None:
        """Start from this curvature; cuts the passes to less than half. It is no part of the state."""
        self._curvature = Curvature(*(part.to(self._parameter) for part in curvature))

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Take one step: usually one pass, more where the first trial was too long.

        Args:
            closure: Clears the gradient, computes the loss, calls ``backward()`` and returns the loss.
        """
        parameter, state = self._parameter, self._state
        if "gradient" not in state:
            parameter.copy_(F.normalize(parameter, dim=-1))
            value, gradient = self._evaluate(closure)
            state.update(moves=[], changes=[])
            self._settle(value, gradient, float(_tangent(parameter, gradient).norm()))
        before = parameter.clone()
        tangent = _tangent(before, state["gradient"])
        direction = self._direction(before, tangent)
        slope = float((direction * tangent).sum())
        if not slope < 0:
            state.update(moves=[], changes=[])
            direction = -self._divide(before, tangent)
            slope = float((direction * tangent).sum())
        longest = LONGEST_TURN / max(float(direction.norm(dim=-1).max()), torch.finfo(torch.float32).tiny)
        length = min(1.0, longest) if state["moves"] else longest
        found = self._search(closure, before, direction, slope, length)
        if found is None:
            parameter.copy_(before)
            state.update(moves=[], changes=[])
        else:
            self._remember(before, tangent, *found)
        return self._loss()

    def _search(
        self, closure: Closure, before: Tensor, direction: Tensor, slope: float, length: float
    ) -> tuple[float, Tensor] | None:
        """Move the parameter along ``direction`` until the objective falls enough; None if it does not."""
        parameter, start = self._parameter, self._state["value"]
        slack = ROUNDING * max(1.0, abs(start))
        for _ in range(MAX_TRIALS):
            parameter.copy_(F.normalize(before + length * direction, dim=-1))
            value, gradient = self._evaluate(closure)
            new_slope = float((_tangent(parameter, gradient) * direction).sum())
            flat = value <= start + slack and abs(new_slope) <= CURVATURE * abs(slope)
            if math.isfinite(value) and (value <= start + SUFFICIENT_DECREASE * length * slope or flat):
                return value, gradient
            length = _shorter(length, start, slope, value, new_slope)
        return None

    def _direction(self, point: Tensor, tangent: Tensor) -> Tensor:
        """Return minus the inverse Hessian estimate times the gradient (two-loop recursion)."""
        state = self._state
        carried = [
            (_tangent(point, move), _tangent(point, change))
            for move, change in zip(state["moves"], state["changes"], strict=True)
        ]
        pairs = [(move, change, (move * change).sum()) for move, change in carried]
        pairs = [pair for pair in pairs if pair[2] > 0]
        direction = -tangent
        shares = []
        for move, change, product in reversed(pairs):
            shares.append((move * direction).sum() / product)
            direction = direction - shares[-1] * change
        direction = self._divide(point, direction)
        if pairs:
            _, change, product = pairs[-1]
            direction = direction * (product / (change * self._divide(point, change)).sum())
        for (move, change, product), share in zip(pairs, reversed(shares), strict=True):
            direction = direction + (share - (change * direction).sum() / product) * move
        return _tangent(point, direction)

    def _divide(self, point: Tensor, tangent: Tensor) -> Tensor:
        """Apply the inverse of the curvature within the tangent space."""
        return tangent if self._curvature is None else _tangent(point, self._curvature.divide(tangent))

    def _remember(self, before: Tensor, tangent: Tensor, value: float, gradient: Tensor) -> None:
        state, parameter = self._state, self._parameter
        new_tangent = _tangent(parameter, gradient)
        self._settle(value, gradient, float(new_tangent.norm()))
        move = _tangent(parameter, parameter - before)
        change = new_tangent - _tangent(parameter, tangent)
        if (move * change).sum() > torch.finfo(torch.float32).eps * move.norm() * change.norm():
            memory = self.param_groups[0]["memory"]
            state["moves"] = [*state["moves"], move][-memory:]
            state["changes"] = [*state["changes"], change][-memory:]


def _tangent(point: Tensor, vector: Tensor) -> Tensor:
    """Project onto the tangent space of the unit rows of ``point``."""
    return vector - (vector * point).sum(-1, keepdim=True) * point


def _shorter(length: float, start: float, slope: float, value: float, new_slope: float) -> float:
    """Return the minimiser of the cubic through two values and slopes, within [0.1, 0.5] of ``length``."""
    if not math.isfinite(value):
        return length / 10
    bend = slope + new_slope - 3 * (value - start) / length
    root = bend * bend - slope * new_slope
    if root < 0:
        return length / 2
    root = math.sqrt(root)
    divisor = new_slope - slope + 2 * root
    best = length * (1 - (new_slope + root - bend) / divisor) if divisor else length / 2
    return min(max(best, 0.1 * length), 0.5 * length)

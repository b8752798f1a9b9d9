"""What the objective of phase 1 needs of its targets: sums that never change while the prototypes do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.targets import Selected

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks and returns it."""


CURVATURE_RIDGE = 3.0
"""Added to the second moments of the features, whose mean eigenvalue is one."""
MASS_RIDGE = 0.2
"""Added to the mass of the targets of each class, whose mean is one."""


class Curvature(NamedTuple):
    """A bound on the Hessian of the objective, inverted: what a step along a gradient should be multiplied by."""

    rows: Float[Tensor, "R 1"]
    inverse: Float[Tensor, "D D"]

    def divide(self, gradient: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Multiply by the inverse."""
        return gradient @ self.inverse * self.rows


@dataclass(frozen=True)
class Statistics:
    """Sums over samples, float64, so that parts of a data set add up."""

    products: Float[Tensor, "R D"]
    """Weighted ``targets.T @ features``."""
    mass: Float[Tensor, " R"]
    """Weighted sum of the targets."""
    region_sums: Float[Tensor, "R D"]
    """Sum of the features whose largest target is this row, unweighted."""
    region_counts: Float[Tensor, " R"]
    entropy: Float[Tensor, ""]
    """Weighted entropy of the targets, in nats."""
    weight: Float[Tensor, ""]
    images: Float[Tensor, ""]
    """Images with at least one sample."""
    moments: Float[Tensor, "D D"]
    """Weighted ``features.T @ features``, which tells a solver how curved the objective is."""

    @classmethod
    def zeros(cls, rows: int, width: int) -> Statistics:
        """Statistics of nothing."""
        shapes = ((rows, width), (rows,), (rows, width), (rows,), (), (), (), (width, width))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of(cls, selected: Selected) -> Statistics:
        """Statistics of one image's samples."""
        features, targets = selected.features.float(), selected.targets.float()
        weighted = targets * selected.weights[:, None]
        regions = F.one_hot(targets.argmax(-1), targets.shape[1]).float()
        parts = (
            weighted.T @ features,
            weighted.sum(0),
            regions.T @ features,
            regions.sum(0),
            -torch.special.xlogy(weighted, targets).sum(),
            selected.weights.sum(),
            torch.tensor(float(len(features) > 0)),
            (features * selected.weights[:, None]).T @ features,
        )
        return cls(*(part.double().cpu() for part in parts))

    def __add__(self, other: Statistics) -> Statistics:
        """Join two parts of a data set."""
        pairs = ((getattr(self, part.name), getattr(other, part.name)) for part in fields(self))
        return Statistics(*(a + b for a, b in pairs))

    def all_reduce(self, reduce: AllReduce) -> Statistics:
        """Sum over ranks, in one message."""
        parts = [getattr(self, part.name) for part in fields(self)]
        flat = reduce(torch.cat([part.flatten() for part in parts]))
        summed = torch.split(flat, [part.numel() for part in parts])
        return Statistics(*(total.reshape(part.shape) for total, part in zip(summed, parts, strict=True)))

    @property
    def mean_feature(self) -> Float[Tensor, " D"]:
        """Mean of all features, unweighted, not normalised."""
        return self.region_sums.sum(0) / self.region_counts.sum()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for a file."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def curvature(self) -> Curvature:
        """Return how curved the objective is, up to a factor: alike for all prototypes but for their mass.

        The Hessian of a softmax regression is bounded by the second moments of the features (Böhning, 1992).
        """
        moments = self.moments.cpu() * (len(self.moments) / self.moments.trace().cpu())
        ridge = CURVATURE_RIDGE * torch.eye(len(moments), dtype=moments.dtype)
        mass = self.mass.cpu() * (len(self.mass) / self.mass.sum().cpu())
        return Curvature(1 / (mass + MASS_RIDGE)[:, None], torch.linalg.inv(moments + ridge))

"""Optimisers of phase 2 and their learning rate over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn, optim

from vpl_lightning.errors import ConfigurationError

WARMUP_START = 1e-6
"""Share of the learning rate at the first step of the warm-up (WeCLIP)."""
MAX_WARMUP = 0.1
"""Largest share of a run that warms up, so that short runs reach their learning rate."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """Optimiser and schedule. What is None comes from the preset.

    The learning rate rises linearly over the warm-up, then falls as ``(1 - step / steps) ** power``.

    Attributes:
        preset: ``sgd``: the paper's momentum 0.9 and weight decay 1e-4, with our learning rate 0.01, power
            0.9 and 1,500 steps of warm-up, which it does not give; ``adamw``: WeCLIP's learning rate 2e-3,
            weight decay 0.01, power 1 and 50 steps of warm-up.
        lr: Peak learning rate.
        weight_decay: As the optimiser understands it; single scalars (scales, biases of masks) have none.
        momentum: Of SGD.
        power: Exponent of the decay.
        warmup_steps: At most a tenth of the run.
    """

    preset: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    power: float | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        """Fill in the preset and refuse impossible values."""
        if self.preset not in PRESETS:
            raise ConfigurationError(f"optimizer.preset={self.preset!r} must be one of {', '.join(PRESETS)}")
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        if not self.peak > 0:
            raise ConfigurationError(f"optimizer.lr={self.lr} must be positive")
        for key in ("weight_decay", "power", "warmup_steps"):
            if getattr(self, key) < 0:
                raise ConfigurationError(f"optimizer.{key}={getattr(self, key)} must not be negative")
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"optimizer.momentum={self.momentum} must lie in [0, 1)")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return float(self.lr or 0)

    def build(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        """Make the optimiser of some parameters."""
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in wanted if p.ndim], "weight_decay": self.weight_decay},
            {"params": [p for p in wanted if not p.ndim], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.preset == "sgd":
            return optim.SGD(groups, lr=self.peak, momentum=self.momentum)
        return optim.AdamW(groups, lr=self.peak)

    def schedule(self, optimizer: optim.Optimizer, steps: float) -> optim.lr_scheduler.LambdaLR:
        """Make the schedule of a run of so many steps; advance it after every step.

        Raises:
            ConfigurationError: If the run has no end.
        """
        if not math.isfinite(steps) or steps < 1:
            raise ConfigurationError(
                f"the learning rate needs to know how many steps there will be, not {steps}: set "
                "trainer.max_steps or trainer.max_epochs"
            )
        return optim.lr_scheduler.LambdaLR(optimizer, poly_schedule(self, int(steps)))


PRESETS: dict[str, dict[str, float | int]] = {
    "sgd": {"lr": 0.01, "weight_decay": 1e-4, "power": 0.9, "warmup_steps": 1500},
    "adamw": {"lr": 2e-3, "weight_decay": 0.01, "power": 1.0, "warmup_steps": 50},
}
"""VPL's optimiser, and WeCLIP's as its code has it after the tenfold rate of its decoder group."""


def poly_schedule(spec: OptimizerSpec, steps: int) -> Callable[[int], float]:
    """Return the learning rate of each step as a share of the peak, for a run of ``steps``."""
    warmup = min(int(spec.warmup_steps or 0), int(MAX_WARMUP * steps))
    power = float(spec.power or 0)

    def share(step: int) -> float:
        if step < warmup:
            return WARMUP_START + (1 - WARMUP_START) * step / warmup
        return float(max(0.0, 1 - step / steps) ** power)

    return share

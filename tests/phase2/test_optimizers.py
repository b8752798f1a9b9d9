"""The learning rate over a run, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.tasks.optimizers import OptimizerSpec


def rates(spec: OptimizerSpec, steps: int) -> list[float]:
    optimizer = spec.build([nn.Parameter(torch.ones(2))])
    schedule, found = spec.schedule(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_sgd_follows_the_paper():
    optimizer = OptimizerSpec().build([nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 1e-4)
    found = rates(OptimizerSpec(), 30_000)
    assert found[0] == pytest.approx(1e-8)
    assert found[750] == pytest.approx(0.005, rel=1e-5)
    assert found[1500] == pytest.approx(0.01 * 0.95**0.9)
    assert found[15_000] == pytest.approx(0.01 * 0.5**0.9)
    assert max(found) < 0.01


def test_adamw_follows_weclip():
    spec = OptimizerSpec(preset="adamw")
    optimizer = spec.build([nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2e-3, 0.01, (0.9, 0.999))
    found = rates(spec, 1000)
    assert found[25] == pytest.approx(2e-3 * (1 - (1 - 25 / 50) * (1 - 1e-6)))
    assert found[500] == pytest.approx(1e-3)
    assert found[999] == pytest.approx(2e-6)


def test_given_values_win_over_the_preset():
    spec = OptimizerSpec(preset="adamw", lr=0.5, weight_decay=0.0, power=2.0, warmup_steps=0)
    found = rates(spec, 10)
    assert found == pytest.approx([0.5 * (1 - step / 10) ** 2 for step in range(10)])


def test_a_short_run_warms_up_for_a_tenth():
    found = rates(OptimizerSpec(), 40)
    assert found.index(max(found)) == 4


def test_scalars_do_not_decay():
    scalar, matrix = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2, 2))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    groups = OptimizerSpec().build([scalar, matrix, frozen]).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(1e-4, 1), (0.0, 1)]
    assert groups[1]["params"][0] is scalar


@pytest.mark.parametrize("steps", [float("inf"), 0])
def test_a_run_needs_an_end(steps: float):
    spec = OptimizerSpec()
    with pytest.raises(ConfigurationError, match=r"set trainer.max_steps"):
        spec.schedule(spec.build([nn.Parameter(torch.ones(2))]), steps)

"""Compare the solvers of phase 1 on one set of patches: objective, passes over the data, seconds, angle.

    python benchmarks/solvers.py scenes --encoders tiny.safetensors --out tables
    python benchmarks/solvers.py photos --root VOC2012 --encoders photo.safetensors --out tables

The patches are those of the recipe named by ``--recipe``. The reference is the paper's solver: 3,000 steps of
projected gradient descent. The passes of L-BFGS are counted until its objective is as low.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from command_line import command
from jaxtyping import Float
from prototypes import capped, fit, machine, parse, sources
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.prototypes import PrototypeObjective
from vpl_lightning.functional.recipe import SolverConfig, solve
from vpl_lightning.functional.solvers import PrototypeSolver
from vpl_lightning.tasks import VisionPrototypeModule

REFERENCE = SolverConfig(name="pgd", steps=3000)
"""The paper's."""
OTHERS = (SolverConfig(name="pgd", steps=300), SolverConfig(name="lbfgs", steps=80))
SLACK = 1e-6
"""Nats above the reference that count as reached: what float32 products can resolve."""


@dataclass(frozen=True)
class Result:
    """One solver on one set of patches."""

    solver: str
    steps: int
    passes: int
    reached: int | None
    """Passes until the reference's objective was reached; None if it never was."""
    seconds: float
    objective: float
    mean_angle: float
    """Degrees between a prototype and the reference's, mean over the prototypes."""
    max_angle: float


def compare(objective: PrototypeObjective) -> list[Result]:
    """Solve with the reference, then with the others."""
    results: list[Result] = []
    goal: float | None = None
    target: Float[Tensor, "R D"] | None = None
    for config in (REFERENCE, *OTHERS):
        trace: list[tuple[int, float]] = []

        def note(solver: PrototypeSolver, trace: list[tuple[int, float]] = trace) -> None:
            trace.append((solver.passes, solver.objective))

        begun = time.monotonic()
        found = solve(objective, config, after_step=note)
        seconds = time.monotonic() - begun
        goal = found.objective if goal is None else goal
        target = found.rows if target is None else target
        angles = F.cosine_similarity(found.rows, target, dim=-1).clamp(-1, 1).arccos().rad2deg()
        reached = next((passes for passes, value in trace if value <= goal + SLACK), None)
        results.append(
            Result(
                config.name,
                config.steps,
                found.passes,
                reached,
                round(seconds, 1),
                found.objective,
                float(angles.mean()),
                float(angles.max()),
            )
        )
        print(results[-1], flush=True)
    return results


def main() -> None:
    args = parse(__doc__ or "", recipe=True)
    data, specs, _ = sources(args)
    recipe = replace(capped(args.recipe, args.pixels), solver=SolverConfig(name="lbfgs", steps=1))
    record = []
    for spec, path in zip(specs, args.encoders, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            module = fit(VisionPrototypeModule(encoder=spec, recipe=recipe), data, Path(folder))
            objective = cast(PrototypeObjective, module.objective)
            results = compare(objective)
            weight = float(objective.statistics.weight)
        record.append(
            {"encoder": Path(path).name, "patches": weight, "results": [asdict(one) for one in results]}
        )
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"command": command(sys.argv), "machine": machine(), "recipe": args.recipe, "encoders": record}
    (args.out / f"solvers_{args.data}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

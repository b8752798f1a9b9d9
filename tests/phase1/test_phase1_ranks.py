"""Phase 1 over gloo ranks: DDP's average of the ranks' gradients gives one process's prototypes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.phase1.test_store import COLUMNS, fill
from vpl_lightning.functional.prototypes import PrototypeObjective
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig, solve
from vpl_lightning.store import FeatureStore, objective_from

RECIPES = {
    "pgd": PrototypeRecipe(solver=SolverConfig(steps=12)),
    "lbfgs": PrototypeRecipe(solver=SolverConfig(name="lbfgs", steps=8)),
}


class Rows(nn.Module):
    """What a task holds: the rows as its one parameter."""

    def __init__(self, rows: Tensor, objective: PrototypeObjective) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.objective = objective

    def forward(self) -> Tensor:
        return self.objective(self.rows)


def all_reduce(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def learn(rank: int, world_size: int, folder: str, text: Tensor) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    store = FeatureStore(
        Path(folder) / "store", {"seed": 0}, rows=7, width=24, rank=rank, world_size=world_size
    )
    for name, recipe in RECIPES.items():
        torch.save(solved(store, text, recipe, world_size), f"{folder}/{name}-{rank}.pt")
    gc.collect()  # DDP's threads must be gone before the group is
    distributed.barrier()
    distributed.destroy_process_group()


def solved(
    store: FeatureStore, text: Tensor, recipe: PrototypeRecipe, world_size: int
) -> dict[str, Tensor | float]:
    objective = objective_from(store, COLUMNS, text, recipe, all_reduce=all_reduce, world_size=world_size)
    module = DistributedDataParallel(Rows(objective.initial(), objective))
    solver = recipe.solver.build(module.parameters())

    def closure() -> Tensor:
        solver.zero_grad()
        loss = module()
        loss.backward()
        return loss

    for _ in range(recipe.solver.steps):
        solver.step(closure)
    rows = module.module.rows.detach().clone()
    return {"rows": rows, "objective": solver.objective, "passes": solver.passes}


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path, clusters) -> None:
    store = fill(tmp_path / "store", clusters.parts(), 2)
    spawn(learn, args=(2, str(tmp_path), clusters.text), nprocs=2)
    for name, recipe in RECIPES.items():
        alone = solve(objective_from(store, COLUMNS, clusters.text, recipe), recipe.solver)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(found["rows"], alone.rows, atol=1e-9, rtol=0)
            assert found["passes"] == alone.passes
            assert found["objective"] == pytest.approx(alone.objective, rel=1e-12)

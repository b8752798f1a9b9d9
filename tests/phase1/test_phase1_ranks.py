"""Phase 1 over gloo ranks: the average of their gradients, as DDP takes it, gives one process's prototypes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from tests.phase1.test_store import COLUMNS, fill
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig, solve
from vpl_lightning.store import FeatureStore, objective_from

RECIPES = {
    "pgd": PrototypeRecipe(solver=SolverConfig(steps=12)),
    "lbfgs": PrototypeRecipe(solver=SolverConfig(name="lbfgs", steps=8)),
}


THREADS = 1
"""Threads of every process: another number sums the float32 products in another order (1e-7 in a prototype)."""


def all_reduce(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def learn(rank: int, world_size: int, folder: str, text: Tensor) -> None:
    torch.set_num_threads(THREADS)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    store = FeatureStore(
        Path(folder) / "store", {"seed": 0}, rows=7, width=24, rank=rank, world_size=world_size
    )
    for name, recipe in RECIPES.items():
        torch.save(solved(store, text, recipe, world_size), f"{folder}/{name}-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def solved(
    store: FeatureStore, text: Tensor, recipe: PrototypeRecipe, world_size: int
) -> dict[str, Tensor | float]:
    objective = objective_from(store, COLUMNS, text, recipe, all_reduce=all_reduce, world_size=world_size)
    rows = nn.Parameter(objective.initial())
    solver = recipe.solver.build([rows])
    solver.precondition(objective.statistics.curvature())

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective(rows)
        loss.backward()
        rows.grad = all_reduce(rows.grad) / world_size
        return loss

    for _ in range(recipe.solver.steps):
        solver.step(closure)
    return {"rows": rows.detach(), "objective": solver.objective, "passes": solver.passes}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_learn_what_one_process_learns(tmp_path: Path, clusters, world_size: int) -> None:
    store = fill(tmp_path / "store", clusters.parts(), 2)
    spawn(learn, args=(world_size, str(tmp_path), clusters.text), nprocs=world_size)
    for name, recipe in RECIPES.items():
        alone = solve(objective_from(store, COLUMNS, clusters.text, recipe), recipe.solver)
        for rank in range(world_size):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(found["rows"], alone.rows, atol=1e-9, rtol=0)
            assert found["passes"] == alone.passes
            assert found["objective"] == pytest.approx(alone.objective, rel=1e-12)

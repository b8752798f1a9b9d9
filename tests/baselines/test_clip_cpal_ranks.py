"""``clip_cpal`` under DDP: two gloo processes gather the bank, the prototypes and the masks of one."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from tests.trainers import trainer
from vpl_lightning.artifacts import read_maps, read_prototypes
from vpl_lightning.data import ShapesDataModule
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig
from vpl_lightning.masks import MaskConfig
from vpl_lightning.specs import GeneratorSpec
from vpl_lightning.tasks import VisionPrototypeModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:predict returned None"),
]
CAPACITY = 4
"""Instance prototypes a class: fewer than the scenes have, so that ranks must agree on which to keep."""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes."""
    root = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work_of_a_rank, (port, root), nprocs=2)
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process, on one thread as the ranks are."""
    root, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    run(root)
    torch.set_num_threads(threads)
    return root


def work_of_a_rank(rank: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, LOCAL_RANK=str(rank), NODE_RANK="0")
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    run(root, rank, devices=2, strategy="ddp")
    distributed.destroy_process_group()


def run(root: Path, rank: int = 0, **ranks: object) -> None:
    """Learn prototypes and make masks; leave the bank that the generator holds in the end."""
    module = VisionPrototypeModule(
        generator=GeneratorSpec(name="clip_cpal", options={"capacity": CAPACITY, "clusters": 2}),
        recipe=PrototypeRecipe(solver=SolverConfig(steps=5)),
        masks=MaskConfig(refiner="none"),
        mask_workers=0,
        keep_maps=True,
        block_size=4,
        batch_size=3,
    )
    silent = trainer(root, max_epochs=1, **ranks)
    data = ShapesDataModule(train_images=22, val_images=1, test_images=1)
    silent.fit(module, datamodule=data)
    silent.predict(module, datamodule=data, return_predictions=False)
    torch.save(module.generator.bank_state(), root / f"held-{rank}.pt")


def test_every_rank_holds_the_bank_of_one_process(alone: Path, together: Path) -> None:
    expected = torch.load(alone / "held-0.pt", weights_only=True)
    counts = torch.bincount(expected["classes"], minlength=10)
    assert int(counts.max()) == CAPACITY
    for rank in range(2):
        found = torch.load(together / f"held-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{key} of rank {rank}"
    assert (together / "bank.safetensors").read_bytes() == (alone / "bank.safetensors").read_bytes()


def test_prototypes_and_maps_are_those_of_one_process(alone: Path, together: Path) -> None:
    one, two = (read_prototypes(root / "prototypes.safetensors").prototypes for root in (alone, together))
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
    names = sorted(path.name for path in (alone / "maps").glob("*.safetensors"))
    assert len(names) == 22
    assert sorted(path.name for path in (together / "maps").glob("*.safetensors")) == names
    for name in names:
        first, second = (read_maps(root / "maps" / name) for root in (alone, together))
        assert first.classes.tolist() == second.classes.tolist()
        np.testing.assert_allclose(second.cams, first.cams, atol=1e-3)
        np.testing.assert_allclose(second.affinity, first.affinity, atol=1e-3)

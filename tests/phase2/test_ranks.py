"""Two gloo processes against one: gathered rows and their gradients, a data set of odd size, predictions."""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.phase2.standin import PLAIN, SquaresDataModule, StandIn, module, trainer
from vpl_lightning.decoder import DecoderOutput
from vpl_lightning.tasks import PredictionSpec
from vpl_lightning.tasks.gather import gather_list, gather_rows
from vpl_lightning.tasks.losses import LossSpec, SegmentationLoss

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
N, D = 4, 8


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes, joined by gloo, have left what they found."""
    root = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work_of_a_rank, (port, root), nprocs=2)
    return root


def work_of_a_rank(rank: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, LOCAL_RANK=str(rank), NODE_RANK="0")
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    gather_and_contrast(rank, root)
    learn_score_and_predict(rank, root)
    distributed.destroy_process_group()


class Contrast(torch.nn.Module):
    """A linear embedding under the contrast, wrapped as phase 2 is."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = torch.nn.Conv2d(3, D, 1).double()
        self.loss = SegmentationLoss(LossSpec(rsc_mode=mode, lambda_ce=0.0), gather=gather_rows).double()

    def forward(self, images: Tensor, mask: Tensor, tags: Tensor) -> Tensor:
        prototypes = F.normalize(torch.arange(5.0 * D, dtype=torch.float64).view(5, D).sin(), dim=1)
        embedding = F.normalize(self.embed(images), dim=1)
        logits = embedding[:, : N + 1]
        return self.loss(DecoderOutput(logits, embedding), mask, tags, prototypes).total


def contrast_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Five images; each shows at most one class, so that nothing is left to chance; the third shows none."""
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([1, 3, 0, 3, 2])
    mask = labels[:, None, None].expand(-1, 4, 4).contiguous()
    tags = F.one_hot(labels, N + 1)[:, 1:].bool()
    tags[4, 2] = True
    return images, mask, tags


def gradients(mode: str, share: slice, *, parallel: bool) -> dict[str, Tensor]:
    model = Contrast(mode)
    wrapped = DistributedDataParallel(model) if parallel else model
    value = wrapped(*(part[share] for part in contrast_batch()))
    value.backward()
    return {"value": value.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def gather_and_contrast(rank: int, root: Path) -> None:
    rows = torch.arange(3.0 * (rank + 1)).view(rank + 1, 3).requires_grad_()
    gathered = gather_rows(rows)
    assert gathered.shape == (3, 3)
    gathered[rank:].sum().backward()
    # Rank 0 has row 0 of 3, counted twice; of rank 1's rows both are in the sum.
    assert rows.grad.eq(2).all()
    flags = gather_rows(torch.tensor([True, False][: rank + 1]))
    assert flags.tolist() == [True, True, False]
    assert gather_rows(torch.zeros(0, 2) if rank else torch.ones(2, 2)).sum() == 4
    assert gather_list([rank] * (2 - rank)) == [0, 0, 1]
    share = slice(0, 3) if rank == 0 else slice(3, 5)
    found = {mode: gradients(mode, share, parallel=True) for mode in ("tcl_sampled", "region_class")}
    torch.save(found, root / f"{rank}.pt")


def test_two_ranks_contrast_like_one(ranks: Path):
    for mode in ("tcl_sampled", "region_class"):
        expected = gradients(mode, slice(0, 5), parallel=False)
        assert expected["value"] > 0.1
        for rank in range(2):
            found = torch.load(ranks / f"{rank}.pt", weights_only=True)[mode]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, msg=f"{mode} {name} of rank {rank}")


def learn_score_and_predict(rank: int, root: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run = trainer(root, devices=2, strategy="ddp", max_steps=2)
    task = module(StandIn(), evaluation=PLAIN, prediction=PredictionSpec(server_archive=True))
    run.fit(task, datamodule=SquaresDataModule())
    run.test(task, datamodule=SquaresDataModule(), verbose=False)
    found = run.predict(task, datamodule=SquaresDataModule())
    seen = {
        "matrix": task.results["test"].tolist(),
        "weights": [value.double().sum().item() for value in task.state_dict().values()],
        "predicted": [name for batch in found for name in batch],
    }
    (root / f"{rank}.json").write_text(json.dumps(seen))


def test_two_ranks_score_and_predict_like_one(ranks: Path, tmp_path: Path):
    """Seven images to score: one rank has four, the other three."""
    first, second = (json.loads((ranks / f"{rank}.json").read_text()) for rank in range(2))
    assert first["matrix"] == second["matrix"]
    assert first["weights"] == second["weights"]
    assert sorted(first["predicted"] + second["predicted"]) == [str(1000 + i) for i in range(7)]
    assert not set(first["predicted"]) & set(second["predicted"])
    one = trainer(tmp_path)
    task = module(StandIn(), evaluation=PLAIN)
    one.test(task, SquaresDataModule(), ckpt_path=ranks / "decoder/checkpoints/last.ckpt", verbose=False)
    assert task.results["test"].tolist() == first["matrix"]
    assert (ranks / "predictions" / "voc2012_comp6_test_cls.tar.gz").is_file()

"""Two and three gloo processes against one: gathered rows and their gradients, a data set of odd size, predictions."""

from __future__ import annotations

import json
import logging
import os
import socket
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.phase2.standin import PLAIN, SquaresDataModule, StandIn, module
from tests.trainers import trainer
from vpl_lightning.decoder import DecoderOutput
from vpl_lightning.tasks import PredictionSpec
from vpl_lightning.tasks.gather import gather_list, gather_rows
from vpl_lightning.tasks.losses import LossSpec, SegmentationLoss

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
N, D = 4, 8
FEW = (1, 2, 3, 5)
"""Images to predict, of which ranks get unlike shares, and some none."""
SHARES = {2: [(0, 3), (3, 5)], 3: [(0, 2), (2, 3), (3, 5)]}
"""First and last image of the contrast on each rank, by number of ranks; one rank of three has no foreground."""


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder in which processes, joined by gloo, have left what they found, and their number."""
    root = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work_of_a_rank, (request.param, port, root), nprocs=request.param)
    return root, request.param


def work_of_a_rank(rank: int, world_size: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ.update(place, WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), NODE_RANK="0")
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    gather_and_contrast(rank, world_size, root)
    learn_score_and_predict(rank, world_size, root)
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


def gather_and_contrast(rank: int, world_size: int, root: Path) -> None:
    starts = [r * (r + 1) // 2 for r in range(world_size + 1)]
    rows = torch.arange(3.0 * (rank + 1)).view(rank + 1, 3).requires_grad_()
    gathered = gather_rows(rows)
    assert gathered.shape == (starts[-1], 3)
    assert gathered[starts[rank] : starts[rank + 1]].equal(rows)
    gathered.square().sum().backward()
    # Every rank computes the same sum; data-parallel training takes the mean over ranks.
    assert rows.grad.equal(2 * world_size * rows.detach())
    flags = gather_rows(torch.tensor([True, *[False] * rank]))
    assert flags.nonzero().flatten().tolist() == starts[:-1]
    assert gather_rows(torch.zeros(0, 2) if rank else torch.ones(2, 2)).sum() == 4
    assert gather_list([rank] * (2 - rank)) == [0, 0, 1]
    first, last = SHARES[world_size][rank]
    found = {
        mode: gradients(mode, slice(first, last), parallel=True) for mode in ("tcl_sampled", "region_class")
    }
    torch.save(found, root / f"{rank}.pt")


def test_ranks_contrast_like_one(ranks: tuple[Path, int]):
    root, world_size = ranks
    for mode in ("tcl_sampled", "region_class"):
        expected = gradients(mode, slice(0, 5), parallel=False)
        assert expected["value"] > 0.1
        for rank in range(world_size):
            found = torch.load(root / f"{rank}.pt", weights_only=True)[mode]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, msg=f"{mode} {name} of rank {rank}")


def learn_score_and_predict(rank: int, world_size: int, root: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run = trainer(root, devices=world_size, strategy="ddp", max_steps=2)
    task = module(StandIn(), evaluation=PLAIN, prediction=PredictionSpec(server_archive=True))
    run.fit(task, datamodule=SquaresDataModule())
    run.test(task, datamodule=SquaresDataModule(), verbose=False)
    found = run.predict(task, datamodule=SquaresDataModule())
    for size in FEW:
        data = SquaresDataModule(val=size)
        few = trainer(root / f"few_{size}", devices=world_size, strategy="ddp")
        alone = module(StandIn(), evaluation=PLAIN, prediction=PredictionSpec(server_archive=True))
        alone.attach(data.classes)
        few.predict(alone, datamodule=data)
    seen = {
        "matrix": task.results["test"].tolist(),
        "weights": [value.double().sum().item() for value in task.state_dict().values()],
        "predicted": [name for batch in found for name in batch],
    }
    (root / f"{rank}.json").write_text(json.dumps(seen))


def test_ranks_score_and_predict_like_one(ranks: tuple[Path, int], tmp_path: Path):
    """Seven images to score: uneven shares, whether two or three ranks have them."""
    root, world_size = ranks
    found = [json.loads((root / f"{rank}.json").read_text()) for rank in range(world_size)]
    for other in found[1:]:
        assert other["matrix"] == found[0]["matrix"]
        assert other["weights"] == found[0]["weights"]
    assert sorted(name for one in found for name in one["predicted"]) == [str(1000 + i) for i in range(7)]
    one = trainer(tmp_path)
    task = module(StandIn(), evaluation=PLAIN)
    one.test(task, SquaresDataModule(), ckpt_path=root / "decoder/checkpoints/last.ckpt", verbose=False)
    assert task.results["test"].tolist() == found[0]["matrix"]
    assert (root / "predictions" / "voc2012_comp6_test_cls.tar.gz").is_file()


def test_no_image_is_lost_or_predicted_twice_whatever_their_number(ranks: tuple[Path, int]):
    for size in FEW:
        folder = ranks[0] / f"few_{size}" / "predictions"
        names = {f"{1000 + number}.png" for number in range(size)}
        assert {path.name for path in folder.glob("*.png")} == names
        with tarfile.open(folder / "voc2012_comp6_test_cls.tar.gz") as archive:
            assert sorted(Path(name).name for name in archive.getnames()) == sorted(names)

"""Phase 2 stops, goes on where it stopped, and keeps what it is asked to keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.models import tiny_clip
from tests.phase2.standin import CLASSES, FAST, LAST, PLAIN, SMALL, SquaresDataModule, StandIn, module
from tests.trainers import trainer
from vpl_lightning.artifacts import Manifest, write_mask
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.tasks import DecoderModule, LossSpec, OptimizerSpec

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def weights(task: DecoderModule) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in task.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def test_checkpoints_hold_plain_values_and_no_encoder(trained: tuple[DecoderModule, Path]):
    task, root = trained
    checkpoint = torch.load(root / LAST, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(task.state_dict())
    assert "decoder.prototypes" in checkpoint["state_dict"]
    record = checkpoint["vpl_lightning"]
    assert record["stage"] == "decoder"
    assert record["classes"] == ["red", "green", "blue"]
    assert record["encoder"] == task.encoder.fingerprint()
    assert checkpoint["hyper_parameters"]["decoder"]["width"] == 32


def test_a_checkpoint_becomes_a_task_again(trained: tuple[DecoderModule, Path]):
    task, root = trained
    localiser = StandIn(seed=5)
    localiser.attach(CLASSES)
    loaded = DecoderModule.load_from_checkpoint(root / LAST, localiser=localiser)
    assert loaded.decoder_spec == SMALL
    assert loaded.evaluation == PLAIN
    assert same(weights(loaded), weights(task))
    picture = SquaresDataModule().evaluation_dataset("val")[0]["image"]
    np.testing.assert_array_equal(loaded.segment(picture)[0], task.segment(picture)[0])


def refusal(path: Path, localiser: StandIn, **changes: Any) -> str:
    localiser.attach(replace(CLASSES, **changes))
    with pytest.raises(ConfigurationError) as caught:
        DecoderModule.load_from_checkpoint(path, localiser=localiser)
    return str(caught.value)


def test_a_checkpoint_of_something_else_is_refused_by_name(
    trained: tuple[DecoderModule, Path], tmp_path: Path
):
    path = trained[1] / LAST
    other = refusal(path, StandIn(), foreground=("red", "lime", "blue"))
    assert "has 'green' as class 2, where the data has 'lime'" in other
    fewer = refusal(path, StandIn(), foreground=("red", "green"), prompts=("red", "green"))
    assert "has 3 classes, the data 2" in fewer
    assert "trained on the CLIP" in refusal(path, StandIn(encoder=CLIPEncoder(tiny_clip(seed=1))))
    checkpoint = torch.load(path, weights_only=True)
    for key, message in (
        ({"stage": "prototypes"}, "one of the stage 'prototypes'"),
        (None, "does not come from"),
    ):
        record = checkpoint["vpl_lightning"]
        changed = {**checkpoint, "vpl_lightning": None if key is None else {**record, **key}}
        torch.save(changed, tmp_path / "changed.ckpt")
        assert message in refusal(tmp_path / "changed.ckpt", StandIn())


def test_a_registered_encoder_stays_out_of_checkpoints(tmp_path: Path):
    class Registering(StandIn):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.nn.Module()
            self.generator.encoder = torch.nn.Linear(2, 2)
            self.own = torch.nn.Linear(2, 2)
            self.attach(CLASSES)

    task = Registering()
    task.trainer = trainer(tmp_path)
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"own.weight", "own.bias"}
    other = Registering()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert other.own.weight.equal(task.own.weight)
    assert not other.generator.encoder.weight.equal(task.generator.encoder.weight)


class StopAt(Callback):
    """Saves a checkpoint after a step and ends the run, as a killed one would."""

    def __init__(self, path: Path, step: int, *, at_end_of_epoch: bool) -> None:
        self.path, self.step, self.at_end_of_epoch = path, step, at_end_of_epoch

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.at_end_of_epoch and trainer.global_step == self.step:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        if self.at_end_of_epoch and trainer.global_step == self.step:
            self._stop(trainer)

    def _stop(self, trainer: Any) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after three epochs of three steps."""
    task = module(losses=LossSpec(rsc_mode="tcl_sampled"))
    trainer(tmp_path_factory.mktemp("whole"), max_epochs=3).fit(task, datamodule=SquaresDataModule())
    return weights(task)


@pytest.mark.parametrize(
    ("step", "at_end_of_epoch", "workers"),
    [(2, False, 0), (4, False, 0), (5, False, 2), (3, True, 0), (6, False, 0), (6, True, 2)],
)
def test_stopping_and_going_on_changes_no_bit(
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    step: int,
    at_end_of_epoch: bool,
    workers: int,
):
    path = tmp_path / "stopped.ckpt"
    settings = {"losses": LossSpec(rsc_mode="tcl_sampled")}
    first = trainer(tmp_path, max_epochs=3, callbacks=[StopAt(path, step, at_end_of_epoch=at_end_of_epoch)])
    first.fit(module(**settings), datamodule=SquaresDataModule(num_workers=workers))
    assert first.global_step == step
    task = module(**settings)
    torch.rand(7)
    second = trainer(tmp_path, max_epochs=3)
    second.fit(task, datamodule=SquaresDataModule(num_workers=workers), ckpt_path=path)
    assert second.global_step == 9
    assert same(weights(task), uninterrupted)


def test_a_finished_run_can_be_prolonged(tmp_path: Path, uninterrupted: dict[str, torch.Tensor]):
    constant = OptimizerSpec(preset="sgd", lr=0.05, power=0.0, warmup_steps=0)
    whole, part, rest = (module(optimizer=constant) for _ in range(3))
    for task, epochs, path in ((whole, 3, None), (part, 2, None), (rest, 3, tmp_path / "part" / LAST)):
        root = tmp_path / ("part" if task is part else "other")
        trainer(root, max_epochs=epochs).fit(task, datamodule=SquaresDataModule(), ckpt_path=path)
    assert same(weights(rest), weights(whole))
    assert not same(weights(part), weights(whole))


def test_the_latest_state_is_kept(tmp_path: Path):
    class Record(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
            path = tmp_path / LAST
            self.steps.append(torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0)

    record = Record()
    run = trainer(tmp_path, max_steps=6, callbacks=[record])
    run.fit(module(checkpoint_steps=2), datamodule=SquaresDataModule())
    assert record.steps == [0, 0, 2, 2, 4, 4]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 6


def test_a_run_folder_knows_what_to_go_on_from(
    trained: tuple[DecoderModule, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, data = trained[1], SquaresDataModule()
    run = trainer(root)
    latest = module().checkpoint_to_resume(run, data)
    assert latest is not None
    assert latest == root / LAST
    assert module().latest_checkpoint(run) == latest
    best = module().checkpoint_to_resume(run, data, "best")
    assert best is not None
    assert best.name.startswith("epoch=")
    assert module().checkpoint_to_resume(run, data, str(latest)) == latest
    capsys.readouterr()
    changed = module(optimizer=replace(FAST, lr=0.1))
    assert changed.checkpoint_to_resume(run, data) is None
    assert "training anew, because of" in (said := capsys.readouterr().out)
    assert "settings.optimizer.lr changed from 0.005 to 0.1" in said
    assert module(StandIn(seed=1)).checkpoint_to_resume(run, data) is None
    assert "prototypes changed" in capsys.readouterr().out
    masks = tmp_path / "masks"
    for row in range(10):
        write_mask(masks / f"{row}.png", np.zeros((40, 48), np.uint8))
    Manifest({"made": "elsewhere"}).write(masks)
    data.use_pseudo_masks(masks)
    assert module().checkpoint_to_resume(run, data) is None
    assert f"to '{Manifest({'made': 'elsewhere'}).fingerprint}'" in capsys.readouterr().out
    empty = trainer(tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    assert module().checkpoint_to_resume(empty, data) is None
    with pytest.raises(ConfigurationError, match="no such checkpoint of the stage 'decoder'"):
        module().latest_checkpoint(empty)
    with pytest.raises(ConfigurationError, match=r"ckpt_path='nowhere.ckpt' is no file"):
        module().checkpoint_to_resume(empty, data, "nowhere.ckpt")


def test_scores_are_of_the_weights_at_hand(tmp_path: Path):
    """Neither the sanity check nor a validation before the last step passes for a score of the outcome."""
    task, often = module(), {"limit_val_batches": 1, "num_sanity_val_steps": 1}
    trainer(tmp_path, max_epochs=1, check_val_every_n_epoch=2, **often).fit(task, SquaresDataModule())
    assert task.results == {}
    task = module()
    trainer(tmp_path / "early", max_steps=3, val_check_interval=2, **often).fit(task, SquaresDataModule())
    assert task.results == {}
    task = module()
    trainer(tmp_path / "last", max_epochs=1, **often).fit(task, SquaresDataModule())
    assert set(task.results) == {"val"}


def test_checkpoints_need_an_interval():
    with pytest.raises(ConfigurationError, match=r"model.checkpoint_steps=0"):
        module(checkpoint_steps=0)

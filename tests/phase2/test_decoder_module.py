"""Phase 2 on coloured squares: it learns, stops and goes on, scores and predicts."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from torch.nn import functional as F

from tests.models import tiny_clip
from tests.phase2.standin import CLASSES, FAST, PLAIN, SMALL, SquaresDataModule, StandIn, module
from tests.trainers import trainer
from vpl_lightning.artifacts import Manifest, read_mask, write_mask
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.confusion import confusion_matrix
from vpl_lightning.functional.contrast import region_class, region_masks, tcl_sampled
from vpl_lightning.tasks import DecoderModule, InferenceSpec, LossSpec, OptimizerSpec, PredictionSpec
from vpl_lightning.tasks.losses import SegmentationLoss

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


LAST = "decoder/checkpoints/last.ckpt"


def weights(task: DecoderModule) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in task.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderModule, Path]:
    """A task after six steps, and its run folder with checkpoints."""
    root = tmp_path_factory.mktemp("run")
    task = module()
    keep = ModelCheckpoint(root / "checkpoints", monitor="val_miou", mode="max")
    run = trainer(root, max_epochs=2, limit_val_batches=1.0, callbacks=[keep], enable_checkpointing=True)
    run.fit(task, datamodule=SquaresDataModule())
    return task, root


@pytest.mark.parametrize("head", ["prototype", "linear"])
def test_it_learns_to_segment(tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]):
    task, data = module(decoder=replace(SMALL, head=head)), SquaresDataModule(train=24)
    run = trainer(tmp_path, max_epochs=9, limit_val_batches=1.0, check_val_every_n_epoch=9)
    run.validate(task, datamodule=data, verbose=False)
    before = float(run.callback_metrics["val_miou"])
    capsys.readouterr()
    run.fit(task, datamodule=data)
    assert before < 0.3 < 0.5 < run.callback_metrics["val_miou"]
    assert {"train/ce", "train/rsc", "lr"} <= set(run.callback_metrics)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-5:]] == ["background", "red", "green", "blue", "mean"]
    assert float(table[-1].split()[1]) == pytest.approx(
        100 * float(run.callback_metrics["val_miou"]), abs=0.01
    )


def test_the_score_is_that_of_the_predictions(tmp_path: Path, trained: tuple[DecoderModule, Path]):
    task, data = trained[0], SquaresDataModule()
    trainer(tmp_path).test(task, datamodule=data, verbose=False)
    total = torch.zeros(4, 4, dtype=torch.int64)
    images = data.evaluation_dataset("test")
    for row in range(len(images)):
        labels, soft = task.segment(images[row]["image"], probabilities=True)
        np.testing.assert_array_equal(soft.argmax(0), labels)
        np.testing.assert_allclose(soft.sum(0), 1, atol=1e-5)
        total += confusion_matrix(torch.from_numpy(labels), torch.from_numpy(images[row]["mask"]), 4)
    assert task.results["test"].equal(total)


def test_the_encoder_is_no_part_of_the_task(trained: tuple[DecoderModule, Path]):
    task = trained[0]
    names = [*dict(task.named_parameters()), *dict(task.named_modules()), *task.state_dict()]
    assert not [name for name in names if "encoder" in name or "localiser" in name]
    task.train()
    assert not task.encoder.training
    assert all(parameter.grad is None for parameter in task.encoder.parameters())
    moved = module().to(torch.device("meta"))
    assert moved.device.type == "meta"
    localiser = StandIn().to(torch.device("meta"))
    assert localiser.encoder.device.type == "meta"


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


@pytest.mark.parametrize("mode", ["region_class", "tcl_sampled"])
@pytest.mark.parametrize("label", [0, 255])
@pytest.mark.parametrize("balanced", [False, True])
def test_views_without_foreground(mode: str, label: int, balanced: bool):
    task = module(losses=LossSpec(rsc_mode=mode, balanced_ce=balanced))
    task.attach(CLASSES)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    output = task.decoder(task.encoder.hidden(images))
    mask = torch.full((2, 32, 32), label)
    losses = task.loss(output, mask, torch.ones(2, 3, dtype=torch.bool), task.decoder.prototypes)
    losses.total.backward()
    assert losses.rsc == 0
    expected = (
        F.cross_entropy(F.interpolate(output.logits, (32, 32), mode="bilinear"), mask) if label == 0 else 0.0
    )
    torch.testing.assert_close(losses.ce, torch.as_tensor(expected))
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_cross_entropy_alone(tmp_path: Path):
    task = module(decoder=replace(SMALL, head="linear"), losses=LossSpec(lambda_rsc=0.0, balanced_ce=True))
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, datamodule=SquaresDataModule())
    assert "train/rsc" not in run.callback_metrics
    assert run.callback_metrics["train/loss"] == run.callback_metrics["train/ce"]
    assert not list(task.loss.parameters())
    assert task.decoder.embed is None


@pytest.mark.parametrize("mode", ["region_class", "tcl_sampled"])
def test_the_terms_are_weighed_and_added(mode: str):
    spec = LossSpec(lambda_ce=0.5, lambda_rsc=3.0, rsc_mode=mode, rsc_mask="softmax", rsc_temperature=0.2)
    task = module(losses=spec)
    task.attach(CLASSES)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    output = task.decoder(task.encoder.hidden(images))
    mask = torch.tensor([0, 2, 3])[:, None, None].expand(3, 32, 32).contiguous()
    mask[0, :5] = 1
    tags = F.one_hot(torch.arange(3)).bool()
    found = task.loss(output, mask, tags, task.decoder.prototypes)
    torch.testing.assert_close(found.total, 0.5 * found.ce + 3 * found.rsc)
    masks = region_masks(output.embedding, task.decoder.prototypes, kind="softmax", scale=10.0)
    extra = (tags, tags) if mode == "tcl_sampled" else (tags,)
    contrast = tcl_sampled if mode == "tcl_sampled" else region_class
    expected = contrast(output.embedding, task.decoder.prototypes, masks, *extra, temperature=0.2)
    torch.testing.assert_close(found.rsc, expected)


def test_the_contrast_needs_an_embedding():
    task = module(decoder=replace(SMALL, head="linear"), losses=LossSpec(lambda_rsc=0.0))
    task.attach(CLASSES)
    output = task.decoder(task.encoder.hidden(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
    loss, mask = SegmentationLoss(LossSpec()), torch.ones(1, 32, 32, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match="embed=True"):
        loss(output, mask, torch.ones(1, 3, dtype=torch.bool), task.decoder.prototypes)


def test_only_our_data_modules_will_do(tmp_path: Path):
    task = StandIn()
    task.trainer = trainer(tmp_path)
    with pytest.raises(ConfigurationError, match="StandIn needs a SegmentationDataModule"):
        task.require_datamodule()


def test_images_without_truth_are_not_scored_in_silence():
    task = module()
    task.attach(CLASSES)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    batch = {"id": ["x"], "image": [image], "mask": [None], "labels": torch.ones(1, 3, dtype=torch.bool)}
    with pytest.raises(DataError, match="image 'x' has no mask"):
        task.test_step(batch, 0)


def test_half_precision_around_the_frozen_encoder(tmp_path: Path):
    task = module()
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed", limit_val_batches=1.0)
    run.fit(task, datamodule=SquaresDataModule())
    assert all(
        value.isfinite().all() and value.dtype == torch.float32 for value in task.state_dict().values()
    )
    assert 0 <= run.validate(task, datamodule=SquaresDataModule(), verbose=False)[0]["val_miou"] <= 1


def test_predictions_are_written_once(tmp_path: Path, trained: tuple[DecoderModule, Path]):
    path = trained[1] / LAST
    prediction = PredictionSpec(soft=True, overlays=True, server_archive=True)
    evaluation = InferenceSpec(scales=(1.0, 0.75), long_side=40)
    folder, stamps = tmp_path / "predictions", []
    for spec in (evaluation, evaluation, replace(evaluation, crf=None)):
        task = module(prediction=prediction, evaluation=spec)
        run = trainer(tmp_path)
        found = run.predict(task, datamodule=SquaresDataModule(), ckpt_path=path)
        assert sorted(name for batch in found for name in batch) == [str(1000 + i) for i in range(7)]
        stamps.append([(folder / f"{1000 + i}.png").stat().st_ino for i in range(7)])
    assert stamps[0] == stamps[1]
    assert not set(stamps[1]) & set(stamps[2])
    data = SquaresDataModule().evaluation_dataset("val")
    for row in range(7):
        labels, soft = task.segment(data[row]["image"], probabilities=True)
        np.testing.assert_array_equal(read_mask(folder / f"{data.ids[row]}.png", num_classes=4), labels)
        with np.load(folder / "soft" / f"{data.ids[row]}.npz", allow_pickle=False) as stored:
            np.testing.assert_allclose(stored["probabilities"], soft, atol=2e-3)
        with Image.open(folder / "overlays" / f"{data.ids[row]}.png") as overlay:
            assert overlay.size == (48, 40)
    with tarfile.open(folder / "voc2012_comp6_test_cls.tar.gz") as archive:
        assert len(archive.getnames()) == 7


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


def test_a_run_without_end_has_no_learning_rate(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"set trainer.max_steps or trainer.max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module(), datamodule=SquaresDataModule())


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (LossSpec, {"lambda_rsc": -1.0}, r"losses.lambda_rsc=-1.0"),
        (LossSpec, {"lambda_ce": 0.0, "lambda_rsc": 0.0}, "nothing would be learnt"),
        (LossSpec, {"rsc_temperature": 0.0}, r"losses.rsc_temperature=0.0"),
        (LossSpec, {"rsc_mode": "image"}, r"losses.rsc_mode='image'"),
        (LossSpec, {"rsc_mask": "relu"}, r"losses.rsc_mask='relu'"),
        (OptimizerSpec, {"preset": "lion"}, r"optimizer.preset='lion'"),
        (OptimizerSpec, {"lr": 0.0}, r"optimizer.lr=0.0"),
        (OptimizerSpec, {"momentum": 1.0}, r"optimizer.momentum=1.0"),
        (OptimizerSpec, {"warmup_steps": -1}, r"optimizer.warmup_steps=-1"),
    ],
)
def test_wrong_settings_are_named(spec: type, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        spec(**settings)


def test_a_trial_run_writes_nothing(tmp_path: Path):
    trainer(tmp_path, fast_dev_run=True).fit(module(), datamodule=SquaresDataModule())
    assert not list(tmp_path.iterdir())


def test_checkpoints_need_an_interval():
    with pytest.raises(ConfigurationError, match=r"model.checkpoint_steps=0"):
        module(checkpoint_steps=0)

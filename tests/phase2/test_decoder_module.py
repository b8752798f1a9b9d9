"""Phase 2 on coloured squares: it learns, scores and predicts."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.phase2.standin import CLASSES, LAST, SMALL, SquaresDataModule, StandIn, module
from tests.trainers import trainer
from vpl_lightning.artifacts import read_mask
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

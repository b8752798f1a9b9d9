"""The whole method: prototypes, maps and pseudo-masks, decoder, in order, each reused while its inputs still match."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from vpl_lightning.data import SegmentationDataModule
from vpl_lightning.report import write_report
from vpl_lightning.tasks import DecoderModule, SegmentationTask, VisionPrototypeModule

NewTrainer = Callable[..., Trainer]
"""Makes a trainer like the configured one, with some arguments replaced."""


def fit_method(
    model: SegmentationTask,
    datamodule: SegmentationDataModule,
    trainer: Trainer,
    *,
    new_trainer: NewTrainer,
    ckpt_path: str | None = None,
    **options: Any,
) -> None:
    """Fit a model with everything that it needs first.

    Args:
        model: A :class:`VisionPrototypeModule` (phase 1 alone) or a :class:`DecoderModule` (the whole method).
        datamodule: Images and tags.
        trainer: Runs the last stage; products go below its ``default_root_dir``.
        new_trainer: Makes the trainers of the stages before.
        ckpt_path: Resume the last stage from here instead of its own latest checkpoint; ``"last"`` and ``"best"``
            mean those of the run folder.
        options: Passed on to ``Trainer.fit``.
    """
    if isinstance(model, DecoderModule):
        prepare_masks(model.localiser, datamodule, Path(trainer.default_root_dir), new_trainer=new_trainer)
        model.localiser.load_prototypes(model.localiser.prototype_file(trainer.default_root_dir))
        datamodule.use_pseudo_masks(model.localiser.mask_folder(trainer.default_root_dir))
    if datamodule.evaluation_dataset("val").masks is None:
        trainer.limit_val_batches = 0
    resume = model.checkpoint_to_resume(trainer, datamodule, ckpt_path)
    if resume is not None:
        say(f"{model.stage}: going on from {resume}")
    trainer.fit(model, datamodule=datamodule, ckpt_path=None if resume is None else str(resume), **options)
    if isinstance(model, DecoderModule) and model.localiser.report:
        report(model, datamodule, Path(trainer.default_root_dir), new_trainer=new_trainer)


def report(
    model: DecoderModule, datamodule: SegmentationDataModule, root: Path, *, new_trainer: NewTrainer
) -> None:
    """Score text against vision prototypes and the decoder on the validation split; print one table."""
    if datamodule.evaluation_dataset("val").masks is None:
        say("no truth for the validation split: no scores")
        return
    scorer = stage_trainer(new_trainer, root, "report", limit_val_batches=1.0)
    scorer.validate(model.localiser, datamodule=datamodule, verbose=False)
    if "val" not in model.results:
        stage_trainer(new_trainer, root, "decoder", limit_val_batches=1.0).validate(
            model, datamodule=datamodule, verbose=False
        )
    if scorer.is_global_zero:
        say(
            f"scores on the validation split, in {root / 'report.json'}; pictures in {root / 'overview.png'}\n\n"
            + write_report(model, datamodule, root)
        )


def prepare_masks(
    localiser: VisionPrototypeModule,
    datamodule: SegmentationDataModule,
    root: Path,
    *,
    new_trainer: NewTrainer,
) -> None:
    """Make sure that vision prototypes and pseudo-masks exist that match the settings and the data."""
    localiser.attach(datamodule.classes)
    reason = localiser.stale_prototypes(root, datamodule)
    if reason is None:
        say(f"prototypes: reusing {localiser.prototype_file(root)}")
    else:
        say(f"prototypes: learning them, because {reason}")
        fit_method(
            localiser, datamodule, stage_trainer(new_trainer, root, "prototypes"), new_trainer=new_trainer
        )
    localiser.load_prototypes(localiser.prototype_file(root))
    reason = localiser.stale_masks(root, datamodule)
    if reason is None:
        say(f"pseudo-masks: reusing {localiser.mask_folder(root)}")
    else:
        say(f"pseudo-masks: making them, because {reason}")
        maker = stage_trainer(new_trainer, root, "pseudo_masks")
        maker.predict(localiser, datamodule=datamodule, return_predictions=False)


def stage_trainer(new_trainer: NewTrainer, root: Path, name: str, *, limit_val_batches: float = 0) -> Trainer:
    """Make the trainer of another stage than the last: float32, its own log, no validation unless asked."""
    return new_trainer(
        default_root_dir=str(root),
        max_epochs=1,
        max_steps=-1,
        precision="32-true",
        callbacks=[],
        logger=CSVLogger(str(root), name="lightning_logs", version=name),
        limit_val_batches=limit_val_batches,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=1,
        gradient_clip_val=None,
    )


@rank_zero_only
def say(message: str) -> None:
    """Print one line, once whatever the number of ranks."""
    print(f"vpl: {message}", flush=True)

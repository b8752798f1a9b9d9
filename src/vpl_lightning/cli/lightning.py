"""``fit``, ``validate``, ``test`` and ``predict`` as a LightningCLI."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

import vpl_lightning.data  # noqa: F401  (short class names in YAML resolve to what is imported)
from vpl_lightning.artifacts import atomic_write
from vpl_lightning.cli.complaints import FRAME, BriefParser, distil
from vpl_lightning.data import SegmentationDataModule
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.method import fit_method
from vpl_lightning.tasks import SegmentationTask
from vpl_lightning.tasks.checkpoints import chosen_checkpoint


class RunConfigCallback(SaveConfigCallback):
    """Also keeps the configuration of a fit in the run folder, for ``test`` and ``predict`` to read."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; Lightning calls this on the first rank alone."""
        if stage == "fit":
            text = self.parser.dump(self.config, skip_none=False)
            atomic_write(Path(trainer.default_root_dir) / self.config_filename, text.encode())


class VPLCLI(LightningCLI):
    """Runs the whole method on ``fit``; the other subcommands are Lightning's own."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            ConfigurationError: If a setting is refused, without the types that were tried on the way.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError) or not str(error).startswith(FRAME):
                raise
            raise ConfigurationError(distil(str(error))) from error

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Build a trainer like the configured one.

        Logs go to CSV files unless a logger is named. The tasks keep their own checkpoints, so that Lightning
        keeps others only if its ``ModelCheckpoint`` is asked for.
        """
        config = {**self._get(self.config_init, "trainer", default={}), **options}
        if config.get("logger") in (None, True):
            options["logger"] = CSVLogger(config["default_root_dir"], name="lightning_logs")
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_checkpointing") is None:
            options["enable_checkpointing"] = any(isinstance(item, Checkpoint) for item in callbacks)
        return super().instantiate_trainer(**options)

    def fit(self, model: SegmentationTask, datamodule: SegmentationDataModule, **options: Any) -> None:
        """Run every stage that the model asks for, reusing what an earlier run left whole and valid."""
        fit_method(model, datamodule, self.trainer, new_trainer=self.instantiate_trainer, **options)

    def before_test(self) -> None:
        """Refuse to score random weights."""
        self._require_checkpoint("test")

    def before_validate(self) -> None:
        """Refuse to score random weights."""
        self._require_checkpoint("validate")

    def before_predict(self) -> None:
        """Refuse to predict with random weights."""
        self._require_checkpoint("predict")

    def _require_checkpoint(self, command: str) -> None:
        wanted = self.config_init[command].get("ckpt_path") or "last"
        self.config_init[command]["ckpt_path"] = str(
            chosen_checkpoint(self.trainer, self.model.stage, wanted)
        )


def run_trainer(args: ArgsType) -> None:
    """Run one of Lightning's subcommands."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_not_advertisement)
    VPLCLI(
        SegmentationTask,
        SegmentationDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunConfigCallback,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "default_root_dir": "runs/default",
            "inference_mode": False,
            "use_distributed_sampler": False,
        },
        parser_class=BriefParser,
        args=args,
    )


def _is_not_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()

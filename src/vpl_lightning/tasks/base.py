"""What both phases share as LightningModules: scores, and checkpoints that know what they belong to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Int64
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from vpl_lightning.artifacts import canonical
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.data import SegmentationDataModule
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.confusion import mean_iou
from vpl_lightning.metrics import SegmentationConfusion
from vpl_lightning.tasks.checkpoints import KEY, chosen_checkpoint, difference, read_record, run_checkpoints

BACKGROUND = "background"
"""Name of class 0 in tables."""


class SegmentationTask(LightningModule, ABC):
    """Base of the tasks that the command line runs.

    A task names its ``stage`` and, from ``setup`` on, has ``classes`` and the frozen ``encoder``. Give
    frozen modules to :meth:`hold`. Checkpoints never contain weights of the encoder; they name it instead.
    """

    stage: ClassVar[str] = "task"
    """Name of the phase in messages and checkpoints."""
    classes: ClassSet
    encoder: CLIPEncoder

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Int64[Tensor, "C C"]] = {}
        """The last confusion matrix of each evaluated stage, ``val`` or ``test``."""
        self._held: dict[str, nn.Module] = {}
        self._saved: dict[str, Any] = {}
        self._confusions = nn.ModuleDict()

    @property
    def class_names(self) -> list[str]:
        """Names of all classes, background first."""
        return [BACKGROUND, *self.classes.foreground]

    def hold(self, **modules: nn.Module) -> None:
        """Keep frozen modules as attributes that move with this one but are no part of it.

        They stay out of parameters, checkpoints, the strategy's broadcasts and ``train()``; Lightning would
        otherwise warn in every run that it found modules in eval mode.
        """
        for name, module in modules.items():
            self._held[name] = module.to(self.device).eval()
            object.__setattr__(self, name, module)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for module in self._held.values():
            module._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @abstractmethod
    def attach(self, classes: ClassSet) -> None:
        """Take the class set of the data; called before anything that needs it, more than once with the same.

        Raises:
            ConfigurationError: If another class set is attached already.
        """

    def require_datamodule(self) -> SegmentationDataModule:
        """Return the trainer's data module.

        Raises:
            ConfigurationError: If it has none of ours.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, SegmentationDataModule):
            raise ConfigurationError(
                f"{type(self).__name__} needs a SegmentationDataModule: pass one as the trainer's datamodule"
            )
        return datamodule

    def confusion(self, stage: str) -> SegmentationConfusion:
        """Return the confusion matrix that a stage (``val``, ``test``) accumulates."""
        if stage not in self._confusions:
            self._confusions[stage] = SegmentationConfusion(self.classes.num_classes).to(self.device)
        metric = self._confusions[stage]
        assert isinstance(metric, SegmentationConfusion)  # noqa: S101 - for the type checker
        return metric

    def finish_scores(self, stage: str) -> float:
        """Sum the matrix of a stage over ranks into :attr:`results`, log ``<stage>_miou`` and start anew.

        Every rank must call this at the end of the epoch, whether it had images or not.
        """
        confusion = self.confusion(stage)
        self.results[stage] = confusion.compute().cpu()
        confusion.reset()
        score = mean_iou(self.results[stage])
        # Not "stage/miou": the name of a monitored score becomes part of file names. Ranks agree already.
        self.log(f"{stage}_miou", score, prog_bar=True, sync_dist=True)
        return score

    def settings(self, datamodule: SegmentationDataModule | None) -> dict[str, Any]:
        """Return plain settings that a checkpoint must share with this task to be gone on from.

        Args:
            datamodule: What the task is trained on.
        """
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the encoder's weights; say what the others belong to."""
        weights = checkpoint["state_dict"]
        for key in [key for key in weights if _of_encoder(key)]:
            del weights[key]
        if not self._saved:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            self._saved = self._record(getattr(self.trainer, "datamodule", None) if fitting else None)
        checkpoint[KEY] = self._saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another task, class set or encoder; put the encoder's own weights back.

        Raises:
            ConfigurationError: Says what differs.
        """
        self._check(checkpoint.get(KEY))
        own = self.state_dict()
        checkpoint["state_dict"].update({key: own[key] for key in own if _of_encoder(key)})

    def latest_checkpoint(self, trainer: Trainer) -> Path:
        """Return the latest checkpoint of this stage in the run folder.

        Raises:
            ConfigurationError: If there is none.
        """
        return chosen_checkpoint(trainer, self.stage, "last")

    def checkpoint_to_resume(
        self, trainer: Trainer, datamodule: SegmentationDataModule | None, ckpt_path: str | None = None
    ) -> Path | None:
        """Return the checkpoint that training goes on from, or None to start.

        Args:
            trainer: Its ``default_root_dir`` is the run folder.
            datamodule: What the task is trained on.
            ckpt_path: A file, ``last`` or ``best``; refused if it does not fit. None takes the latest
                checkpoint of the run folder that fits, and says why if only others are there.

        Raises:
            ConfigurationError: If the wanted checkpoint does not exist.
        """
        if ckpt_path is not None:
            return chosen_checkpoint(trainer, self.stage, ckpt_path)
        if datamodule is not None:
            self.attach(datamodule.classes)
        wanted = self._record(datamodule)
        reason = None
        for path in run_checkpoints(trainer, self.stage):
            change = difference(read_record(path), wanted)
            if change is None:
                return path
            reason = reason or f"{path.name}: {change}"
        if reason is not None and trainer.is_global_zero:
            print(f"vpl: {self.stage}: training anew, because of {reason}", flush=True)
        return None

    def on_fit_start(self) -> None:
        """Forget what earlier checkpoints said of themselves."""
        self._saved = {}

    def _record(self, datamodule: SegmentationDataModule | None) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "classes": list(self.classes.foreground),
            "encoder": self.encoder.fingerprint(),
            "settings": canonical(self.settings(datamodule)),
        }

    def _check(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise ConfigurationError(
                f"the checkpoint does not come from vpl_lightning's {type(self).__name__}; give one that does"
            )
        if record["stage"] != self.stage:
            raise ConfigurationError(
                f"the checkpoint is one of the stage '{record['stage']}', but {type(self).__name__} is "
                f"'{self.stage}': give the other file, or the configuration that made this one"
            )
        names = list(self.classes.foreground)
        if record["classes"] != names:
            raise ConfigurationError(
                f"the checkpoint {_class_change(record['classes'], names)}; use its class set"
            )
        encoder = self.encoder.fingerprint()
        if record["encoder"] != encoder:
            raise ConfigurationError(
                f"the checkpoint was trained on the CLIP {record['encoder'][:12]}, but 'encoder' is "
                f"{encoder[:12]}: give the same weights, precision and attention_blocks"
            )


def _of_encoder(key: str) -> bool:
    return "encoder" in key.split(".")[:-1]


def _class_change(found: list[str], wanted: list[str]) -> str:
    for index, (old, new) in enumerate(zip(found, wanted, strict=False)):
        if old != new:
            return f"has '{old}' as class {index + 1}, where the data has '{new}'"
    return f"has {len(found)} classes, the data {len(wanted)}"

"""Phase 2 as a LightningModule: a decoder on the frozen CLIP learns from pseudo-masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from vpl_lightning.artifacts import Manifest
from vpl_lightning.clip import ClassSet
from vpl_lightning.data import SegmentationDataModule, TrainingBatch
from vpl_lightning.data.images import MaskFolder
from vpl_lightning.decoder import DecoderSpec, SegmentationDecoder
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.inference import InferenceSpec
from vpl_lightning.predictions import PredictionSpec
from vpl_lightning.tasks.checkpoints import LatestCheckpoint
from vpl_lightning.tasks.gather import gather_rows
from vpl_lightning.tasks.losses import Losses, LossSpec, SegmentationLoss
from vpl_lightning.tasks.optimizers import OptimizerSpec
from vpl_lightning.tasks.randomness import seeded
from vpl_lightning.tasks.resumable import ResumableLoader
from vpl_lightning.tasks.segmenting import VERSION, SegmentingTask
from vpl_lightning.tasks.vision_prototype import VisionPrototypeModule

ORDER = "training_order"
"""Entry of a checkpoint with the place in the order of training."""
Spec = TypeVar("Spec")


class DecoderModule(SegmentingTask):
    """Trains a decoder on the frozen CLIP's hidden layers with pseudo-masks; scores it and predicts.

    The decoder is WeCLIP's; cross-entropy and regional semantic contrast are the paper's. The paper does not
    give learning rate, schedule, crops, scales or the CRF at test; our defaults say where they are from. The
    prototypes are copied from the localiser when training starts and travel in the checkpoint, so that
    scoring and predicting need no other file.

    Args:
        localiser: Phase 1: gives encoder, class set and prototypes. No part of this module's parameters or
            checkpoints.
        decoder: Geometry and head.
        losses: What is minimised.
        optimizer: Optimiser and schedule.
        evaluation: How ``test`` and ``predict`` segment whole images.
        full_validation: Validate like that too. Otherwise at one scale, without flip and CRF.
        prediction: What ``predict`` writes.
        checkpoint_steps: Steps between checkpoints to go on from, ``decoder/checkpoints/last.ckpt``; the last
            step leaves one in any case.
        seed: Of initial weights, dropout and drawn classes.
    """

    stage: ClassVar[str] = "decoder"
    localiser: VisionPrototypeModule
    loss: SegmentationLoss

    def __init__(
        self,
        localiser: VisionPrototypeModule,
        *,
        decoder: DecoderSpec | None = None,
        losses: LossSpec | None = None,
        optimizer: OptimizerSpec | None = None,
        evaluation: InferenceSpec | None = None,
        full_validation: bool = False,
        prediction: PredictionSpec | None = None,
        checkpoint_steps: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            evaluation=_as_spec(InferenceSpec, evaluation),
            full_validation=full_validation,
            prediction=_as_spec(PredictionSpec, prediction),
        )
        if checkpoint_steps < 1:
            raise ConfigurationError(f"model.checkpoint_steps={checkpoint_steps} must be at least 1")
        # Not as a submodule: its weights, metrics and hooks are not this task's.
        object.__setattr__(self, "localiser", localiser)
        self.decoder_spec = _as_spec(DecoderSpec, decoder)
        self.loss_spec = _as_spec(LossSpec, losses)
        self.optimizer_spec = _as_spec(OptimizerSpec, optimizer)
        self.checkpoint_steps = checkpoint_steps
        self.seed = seed
        self._place: dict[str, Any] | None = None
        self.save_hyperparameters(
            {
                "decoder": asdict(self.decoder_spec),
                "losses": asdict(self.loss_spec),
                "optimizer": asdict(self.optimizer_spec),
                "evaluation": asdict(self.evaluation),
                "full_validation": full_validation,
                "prediction": asdict(self.prediction),
                "checkpoint_steps": checkpoint_steps,
                "seed": seed,
            }
        )

    def attach(self, classes: ClassSet) -> None:
        """Have the localiser attach the class set of the data, and build the decoder around its encoder."""
        self.localiser.attach(classes)
        self.configure_model()

    def setup(self, stage: str | None = None) -> None:
        """Build the decoder, and take the vision prototypes from the localiser when training starts."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.localiser.attach(datamodule.classes)
        self.configure_model()
        if stage == "fit":
            self.decoder.prototypes.copy_(self.localiser.prototypes)

    def configure_model(self) -> None:
        """Build the network once; its weights are a function of the seed."""
        if "decoder" in self._modules:
            return
        self.classes = self.localiser.classes
        self.hold(encoder=self.localiser.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.decoder = SegmentationDecoder(
                self.encoder.width,
                self.encoder.depth - 1,
                prototypes=self.localiser.prototypes.cpu(),
                num_labels=len(self.classes.foreground),
                spec=self.decoder_spec,
                embed=self.loss_spec.lambda_rsc > 0,
            ).to(self.device)
        self.loss = SegmentationLoss(self.loss_spec, gather=gather_rows).to(self.device)

    def settings(self, datamodule: SegmentationDataModule | None) -> dict[str, Any]:
        """Return what the decoder's weights depend on besides the encoder and the class names."""
        rows = self.localiser.prototypes.detach().cpu().float().contiguous().numpy()
        own: dict[str, Any] = {
            "version": VERSION,
            "decoder": asdict(self.decoder_spec),
            "losses": asdict(self.loss_spec),
            "optimizer": asdict(self.optimizer_spec),
            "seed": self.seed,
            "prototypes": hashlib.sha256(rows.tobytes()).hexdigest(),
        }
        if datamodule is not None:
            own["data"] = {
                "images": datamodule.fingerprint("train"),
                "masks": _name_of_masks(datamodule),
                "batch_size": datamodule.batch_size,
                "crop_size": datamodule.crop_size,
                "augmentation": asdict(datamodule.augmentation),
                "seed": datamodule.seed,
            }
        return own

    def training_loader(self, datamodule: SegmentationDataModule) -> ResumableLoader:
        """Return the views to train on, in an order that a checkpoint can go on from."""
        return ResumableLoader(datamodule.views_dataloader())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep the place in the order of training."""
        super().on_save_checkpoint(checkpoint)
        loader = self.trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            checkpoint[ORDER] = loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also remember the place in the order of training."""
        self._place = checkpoint.get(ORDER)
        super().on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        """Find the place in the order of training at which an interrupted run stopped.

        Lightning would, had it not been asked before how many steps there are: then it forgets.
        """
        loader = self.trainer.train_dataloader
        if self.trainer.ckpt_path is not None and self._place and isinstance(loader, ResumableLoader):
            loader.load_state_dict(self._place)

    def configure_callbacks(self) -> list[Callback]:
        """Keep the latest state of the run, so that an interrupted fit goes on."""
        if getattr(self.trainer, "fast_dev_run", False):
            return []
        path = Path(self.trainer.default_root_dir) / self.stage / "checkpoints" / "last.ckpt"
        return [LatestCheckpoint(path, steps=self.checkpoint_steps)]

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Forget the scores of earlier weights, those of Lightning's sanity check among them."""
        self.results.pop("val", None)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of views; random numbers depend on seed, epoch, batch and rank alone."""
        with seeded(self.seed, self.current_epoch, batch_idx, self.global_rank, device=self.device):
            output = self.decoder(self.encoder.hidden(batch["image"]))
            losses: Losses = self.loss(output, batch["mask"], batch["labels"], self.decoder.prototypes)
        count = len(batch["id"])
        self.log("train/loss", losses.total, prog_bar=True, batch_size=count)
        self.log("train/ce", losses.ce, batch_size=count)
        if losses.rsc is not None:
            self.log("train/rsc", losses.rsc, batch_size=count)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=count)
        return losses.total

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return optimiser and schedule, over all steps that the trainer will take."""
        optimizer = self.optimizer_spec.build(self.parameters())
        schedule = self.optimizer_spec.schedule(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _name_of_masks(datamodule: SegmentationDataModule) -> str:
    """Name what the masks were made from, where a manifest tells; otherwise where they are."""
    masks = datamodule.training_dataset().masks
    if not isinstance(masks, MaskFolder):
        return repr(masks) if is_dataclass(masks) else type(masks).__qualname__
    manifest = Manifest.read(masks.root)
    return str(masks.root.resolve()) if manifest is None else manifest.fingerprint


def _as_spec(kind: type[Spec], value: Any) -> Spec:
    """Accept settings as checkpoints store them: plain values."""
    if isinstance(value, Mapping):
        return kind(**value)
    return kind() if value is None else value

"""Phase 2 as a LightningModule: a decoder on the frozen CLIP learns from pseudo-masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from vpl_lightning.artifacts import fingerprint
from vpl_lightning.clip import ClassSet
from vpl_lightning.data import EvaluationBatch, SegmentationDataModule, TrainingBatch
from vpl_lightning.decoder import DecoderOutput, DecoderSpec, SegmentationDecoder
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.inference import (
    InferenceSpec,
    enlarge,
    image_probabilities,
    label_image,
    refine_prediction,
    segment_image,
)
from vpl_lightning.metrics import score_table
from vpl_lightning.predictions import PredictionSpec, PredictionWriter, write_server_archive
from vpl_lightning.structures import ImageArray
from vpl_lightning.tasks.base import SegmentationTask
from vpl_lightning.tasks.checkpoints import LatestCheckpoint, state_fingerprint
from vpl_lightning.tasks.gather import gather_list, gather_rows
from vpl_lightning.tasks.losses import Losses, LossSpec, SegmentationLoss
from vpl_lightning.tasks.optimizers import OptimizerSpec
from vpl_lightning.tasks.randomness import seeded
from vpl_lightning.tasks.resumable import ResumableLoader
from vpl_lightning.tasks.vision_prototype import VisionPrototypeModule

VERSION = 1
"""Version of the code of this stage, part of every fingerprint: raise it when its results come out
differently."""
ORDER = "training_order"
"""Entry of a checkpoint with the place in the order of training."""
Spec = TypeVar("Spec")


class DecoderModule(SegmentationTask):
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
    decoder: SegmentationDecoder
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
        super().__init__()
        if checkpoint_steps < 1:
            raise ConfigurationError(f"model.checkpoint_steps={checkpoint_steps} must be at least 1")
        # Not as a submodule: its weights, metrics and hooks are not this task's.
        object.__setattr__(self, "localiser", localiser)
        self.decoder_spec = _as_spec(DecoderSpec, decoder)
        self.loss_spec = _as_spec(LossSpec, losses)
        self.optimizer_spec = _as_spec(OptimizerSpec, optimizer)
        self.evaluation = _as_spec(InferenceSpec, evaluation)
        self.full_validation = full_validation
        self.prediction = _as_spec(PredictionSpec, prediction)
        self.checkpoint_steps = checkpoint_steps
        self.seed = seed
        self._writer: PredictionWriter | None = None
        self._predicted: list[str] = []
        self._model = ""
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

    @property
    def validation(self) -> InferenceSpec:
        """How ``validate`` segments whole images."""
        return (
            self.evaluation
            if self.full_validation
            else replace(self.evaluation, scales=(1.0,), flip=False, crf=None)
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
            own["masks"] = self.localiser.masks.settings(self.localiser.mask_settings(datamodule))
            own["data"] = {
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
        root = Path(self.trainer.default_root_dir)
        return [
            LatestCheckpoint(root / self.stage / "checkpoints" / "last.ckpt", steps=self.checkpoint_steps)
        ]

    def forward(
        self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B C h w"]:
        """Return logits on the patch grid.

        Args:
            images: As :meth:`CLIPEncoder.encode` takes them; sides are patch multiples.
        """
        output: DecoderOutput = self.decoder(self.encoder.hidden(images))
        return output.logits

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

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Score whole images."""
        self._score("val", batch, self.validation)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Score whole images with the full protocol."""
        self._score("test", batch, self.evaluation)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_miou``."""
        self.finish_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_miou``."""
        self.finish_scores("test")

    def on_fit_end(self) -> None:
        """Print the last validation's scores, class by class."""
        self._print_scores("val")

    def on_validation_end(self) -> None:
        """Print the scores of a run that only validates, class by class."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._print_scores("val")

    def on_test_end(self) -> None:
        """Print the scores, class by class."""
        self._print_scores("test")

    def on_predict_start(self) -> None:
        """Open the folder of predictions."""
        folder = self.prediction.folder or Path(self.trainer.default_root_dir) / "predictions"
        self._writer = PredictionWriter(folder, self.prediction)
        self._model = fingerprint(
            [
                VERSION,
                self.encoder.fingerprint(),
                state_fingerprint(self.decoder),
                asdict(self.evaluation),
                asdict(self.prediction),
            ]
        )
        self._predicted = []

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[str]:
        """Write the predictions for whole images; those that the same model has made already are left alone.

        Returns:
            The ids of the images.
        """
        assert self._writer is not None  # noqa: S101 - on_predict_start has opened it
        for image_id, image in zip(batch["id"], batch["image"], strict=True):
            pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
            made_of = fingerprint([self._model, hashlib.sha256(pixels.tobytes()).hexdigest()])
            if not self._writer.has(image_id, made_of):
                labels, soft = self.segment(image, probabilities=self.prediction.soft)
                self._writer.write(image_id, pixels, labels, soft, fingerprint=made_of)
            self._predicted.append(image_id)
        return batch["id"]

    def on_predict_end(self) -> None:
        """Pack the archive for the VOC server, if it is wanted."""
        assert self._writer is not None  # noqa: S101 - on_predict_start has opened it
        if self.prediction.server_archive:
            ids = gather_list(self._predicted)
            if self.trainer.is_global_zero:
                path = write_server_archive(self._writer.folder, ids)
                print(f"vpl: {len(ids)} masks for the VOC server in {path}", flush=True)
            self.trainer.strategy.barrier("server archive")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return optimiser and schedule, over all steps that the trainer will take."""
        optimizer = self.optimizer_spec.build(self.parameters())
        schedule = self.optimizer_spec.schedule(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def segment(
        self,
        image: ImageArray | UInt8[Tensor, "3 H W"],
        *,
        spec: InferenceSpec | None = None,
        probabilities: bool = False,
    ) -> tuple[UInt8[np.ndarray, "H W"], Float32[np.ndarray, "C H W"] | None]:
        """Segment one image.

        Args:
            image: As decoded.
            spec: How; :attr:`evaluation` unless given.
            probabilities: Return those too; they are large.

        Returns:
            Labels of the image's size, 0 for background; and the probabilities, or None.
        """
        spec = spec or self.evaluation
        pixels = torch.from_numpy(image).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
        size = (pixels.shape[1], pixels.shape[2])
        training = self.decoder.training
        self.decoder.eval()
        scores = segment_image(
            self, self.encoder.normalise(pixels[None])[0], patch_size=self.encoder.patch_size, spec=spec
        )
        self.decoder.train(training)
        if spec.crf is not None:
            scores = refine_prediction(pixels.permute(1, 2, 0).cpu().numpy(), scores, spec.crf)
        soft = None
        if probabilities:
            soft = (image_probabilities if spec.crf is None else enlarge)(scores, size).cpu().numpy()
        return label_image(scores, size).cpu().numpy(), soft

    def _score(self, stage: str, batch: EvaluationBatch, spec: InferenceSpec) -> None:
        for image_id, image, mask in zip(batch["id"], batch["image"], batch["mask"], strict=True):
            if mask is None:
                raise DataError(f"image '{image_id}' has no mask to be scored against")
            labels, _ = self.segment(image, spec=spec)
            self.confusion(stage).update(torch.from_numpy(labels).to(mask.device), mask)

    def _print_scores(self, stage: str) -> None:
        if self.trainer.is_global_zero and stage in self.results:
            print(score_table(self.results[stage], self.class_names), flush=True)


def _as_spec(kind: type[Spec], value: Any) -> Spec:
    """Accept settings as checkpoints store them: plain values."""
    if isinstance(value, Mapping):
        return kind(**value)
    return kind() if value is None else value

"""The part of phase 2 that needs no training: whole images are segmented, scored and predicted."""

from __future__ import annotations

import hashlib
from abc import ABC
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vpl_lightning.artifacts import fingerprint
from vpl_lightning.data import EvaluationBatch
from vpl_lightning.decoder import DecoderOutput, SegmentationDecoder
from vpl_lightning.errors import DataError
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
from vpl_lightning.tasks.checkpoints import state_fingerprint
from vpl_lightning.tasks.gather import gather_list

VERSION = 1
"""Version of the code of this stage, part of its fingerprints; raise it when results come out differently."""


class SegmentingTask(SegmentationTask, ABC):
    """A task with a decoder: validates, tests and predicts.

    Args:
        evaluation: How ``test`` and ``predict`` segment whole images.
        full_validation: Validate like that too. Otherwise at one scale, without flip and CRF.
        prediction: What ``predict`` writes.
    """

    decoder: SegmentationDecoder

    def __init__(
        self, *, evaluation: InferenceSpec, full_validation: bool, prediction: PredictionSpec
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        self.full_validation = full_validation
        self.prediction = prediction
        self._writer: PredictionWriter | None = None
        self._predicted: list[str] = []
        self._model = ""

    @property
    def validation(self) -> InferenceSpec:
        """How ``validate`` segments whole images."""
        return (
            self.evaluation
            if self.full_validation
            else replace(self.evaluation, scales=(1.0,), flip=False, crf=None)
        )

    def forward(
        self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B C h w"]:
        """Return logits on the patch grid.

        Args:
            images: As :meth:`CLIPEncoder.encode` takes them; sides are patch multiples.
        """
        output: DecoderOutput = self.decoder(self.encoder.hidden(images))
        return output.logits

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

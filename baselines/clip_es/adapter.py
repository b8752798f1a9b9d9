"""CLIP-ES (CVPR 2023) on the library's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.affinity import balance, refine_cams
from vpl_lightning.functional.gradcam import (
    Score,
    cams_from_weights,
    gradcam_weights,
    gradcam_weights_autograd,
)
from vpl_lightning.functional.vit import BlockTrace
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray


class ClipES(CAMGenerator):
    """Grad-CAM on softmax scores of classes and background words, then class-aware attention affinity.

    Args:
        encoder: The frozen CLIP.
        classes: Class set.
        box_threshold: lambda of the affinity's boxes; None takes the class set's.
        score: What Grad-CAM differentiates.
        gradient: ``closed_form``, or ``autograd`` as the reference.
    """

    info = BaselineInfo(
        paper="CLIP is Also an Efficient Segmenter (CVPR 2023), arXiv 2212.09506",
        origin="re-implemented; github.com/linyq2117/CLIP-ES at 3893f81",
        licence="MIT",
    )

    def __init__(
        self,
        encoder: CLIPEncoder,
        classes: ClassSet | str,
        *,
        box_threshold: float | None = None,
        score: Score = "log_probability",
        gradient: Literal["closed_form", "autograd"] = "closed_form",
    ) -> None:
        super().__init__(encoder, classes)
        self.box_threshold = self.classes.box_threshold if box_threshold is None else box_threshold
        if not 0 <= self.box_threshold < 1:
            raise ConfigurationError(f"box_threshold={self.box_threshold} must lie in [0, 1); CLIP-ES: 0.4 or 0.7")
        self.score: Score = score
        self.gradient = gradient

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid."""
        trace = self.encoder.trace(encoded.tokens)
        maps = []
        for index, (image, present) in enumerate(zip(images, labels, strict=True)):
            cams = cams_from_weights(trace.normed[index], self._weights(trace, index, present), encoded.grid)
            attention = (encoded.attention[index] + trace.attention[index].mean(0)) / encoded.attention_blocks
            affinity = balance(attention[1:, 1:])
            refined = refine_cams(cams, affinity, threshold=self.box_threshold)
            maps.append(ClassCAMs(present, cams, refined, (image.shape[0], image.shape[1])))
        return maps

    def _weights(self, trace: BlockTrace, index: int, present: Tensor) -> Tensor:
        block, head = self.encoder.last_block, self.encoder.head
        num_labels = len(self.classes.foreground)
        if self.gradient == "autograd":
            return gradcam_weights_autograd(
                trace.inputs[index],
                block,
                head,
                self.prototypes,
                present,
                num_labels=num_labels,
                scale=self.scale,
                score=self.score,
            )
        return gradcam_weights(
            trace,
            index,
            block,
            head,
            self.prototypes,
            present,
            num_labels=num_labels,
            scale=self.scale,
            score=self.score,
        )

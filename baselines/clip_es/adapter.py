"""CLIP-ES (CVPR 2023) on the library's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

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
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray

Gradient = Literal["closed_form", "autograd"]


class ClipES(CAMGenerator):
    """Grad-CAM on softmax scores of classes and background words, then class-aware attention affinity.

    How many blocks the affinity averages is the encoder's ``attention_blocks``; without it, this is
    ``grad_cam``.

    Args:
        encoder: The frozen CLIP.
        classes: Class set.
        box_threshold: lambda of the affinity's boxes, a fraction of the map's maximum; None takes the class
            set's (CLIP-ES: 0.4 on VOC, 0.7 on COCO).
        score: What Grad-CAM differentiates. CLIP-ES takes the probability; its logarithm gives the same map
            and does not underflow.
        gradient: ``closed_form``, or ``autograd``: a backward pass a class, as the reference.

    Raises:
        ConfigurationError: If an option has no such value.
    """

    info = BaselineInfo(
        paper="CLIP is Also an Efficient Segmenter (CVPR 2023), arXiv:2212.09506",
        origin="re-implemented from github.com/linyq2117/CLIP-ES at 3893f81",
        licence="MIT",
    )

    def __init__(
        self,
        encoder: CLIPEncoder,
        classes: ClassSet | str,
        *,
        box_threshold: float | None = None,
        score: Score = "log_probability",
        gradient: Gradient = "closed_form",
    ) -> None:
        super().__init__(encoder, classes)
        self.box_threshold = self.classes.box_threshold if box_threshold is None else box_threshold
        if not 0 <= self.box_threshold < 1:
            raise ConfigurationError(
                f"box_threshold={self.box_threshold} must lie in [0, 1); CLIP-ES: 0.4 or 0.7"
            )
        for key, value, known in (("score", score, Score), ("gradient", gradient, Gradient)):
            if value not in get_args(known):
                raise ConfigurationError(f"{key}={value!r} must be one of {', '.join(get_args(known))}")
        self.score: Score = score
        self.gradient: Gradient = gradient

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid."""
        trace = self.encoder.trace(encoded.tokens)
        find = gradcam_weights if self.gradient == "closed_form" else gradcam_weights_autograd
        weights = find(
            trace,
            self.encoder.last_block,
            self.encoder.head,
            self.prototypes,
            labels,
            num_labels=len(self.classes.foreground),
            scale=self.scale,
            score=self.score,
        )
        attention = (encoded.attention + trace.attention.mean(1)) / encoded.attention_blocks
        maps = []
        for index, (image, present) in enumerate(zip(images, labels, strict=True)):
            cams = cams_from_weights(trace.normed[index], weights[index], encoded.grid)
            refined = refine_cams(cams, balance(attention[index, 1:, 1:]), threshold=self.box_threshold)
            maps.append(ClassCAMs(present, cams, refined, (image.shape[0], image.shape[1])))
        return maps

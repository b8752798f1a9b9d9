"""Grad-CAM on a frozen CLIP, as CLIP-ES takes it, without the affinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.gradcam import Score, cams_from_weights, gradcam_weights
from vpl_lightning.functional.vit import BlockTrace
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray


class GradCAM(CAMGenerator):
    """Grad-CAM of the softmax over present classes and background words; the refined map is the map itself.

    Args:
        encoder: The frozen CLIP.
        classes: Class set.
        score: What Grad-CAM differentiates.
    """

    info = BaselineInfo(
        paper="Grad-CAM (ICCV 2017), arXiv 1610.02391",
        origin="re-implemented; target layer and scores of github.com/linyq2117/CLIP-ES at 3893f81",
        licence="MIT",
    )

    def __init__(
        self, encoder: CLIPEncoder, classes: ClassSet | str, *, score: Score = "log_probability"
    ) -> None:
        super().__init__(encoder, classes)
        if score not in get_args(Score):
            raise ConfigurationError(f"score={score!r} must be one of {', '.join(get_args(Score))}")
        self.score: Score = score

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid."""
        found = self.raw_cams(self.encoder.trace(encoded.tokens), encoded.grid, labels)
        return [
            ClassCAMs(present, cams, cams, (image.shape[0], image.shape[1]))
            for image, present, cams in zip(images, labels, found, strict=True)
        ]

    def raw_cams(
        self, trace: BlockTrace, grid: tuple[int, int], labels: Sequence[Tensor]
    ) -> list[Float[Tensor, "K h w"]]:
        """Return the Grad-CAM maps of images whose last block has been traced, each in [0, 1]."""
        weights = gradcam_weights(
            trace,
            self.encoder.last_block,
            self.encoder.head,
            self.prototypes,
            labels,
            num_labels=len(self.classes.foreground),
            scale=self.scale,
            score=self.score,
        )
        return [
            cams_from_weights(normed, own, grid) for normed, own in zip(trace.normed, weights, strict=True)
        ]

"""Cosines of prototypes to dense CLIP features (the MaskCLIP reading), without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder, DenseKind
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.gradcam import minmax
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray


class DenseSimilarity(CAMGenerator):
    """Softmax of each patch over the present classes and all background words, scaled to [0, 1] a class.

    Args:
        encoder: The frozen CLIP.
        classes: Class set.
        features: Which dense features; ``value`` is MaskCLIP's reading.
    """

    info = BaselineInfo(
        paper="Extract Free Dense Labels from CLIP (ECCV 2022), arXiv 2112.01071",
        origin="re-implemented; without key smoothing, prompt denoising and the trained MaskCLIP+",
        licence="MIT",
    )

    def __init__(
        self, encoder: CLIPEncoder, classes: ClassSet | str, *, features: DenseKind = "value"
    ) -> None:
        super().__init__(encoder, classes)
        if features not in get_args(DenseKind):
            raise ConfigurationError(f"features='{features}' is none of {', '.join(get_args(DenseKind))}")
        self.features: DenseKind = features

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid."""
        cosines = self.encoder.dense(encoded, self.features) @ self.prototypes.T
        background = cosines[..., len(self.classes.foreground) :]
        maps = []
        for image, own, words, present in zip(images, cosines, background, labels, strict=True):
            scores = (self.scale * torch.cat([own[:, present], words], dim=-1)).softmax(-1)
            cams = minmax(scores[:, : len(present)].T.reshape(-1, *encoded.grid))
            maps.append(ClassCAMs(present, cams, cams, (image.shape[0], image.shape[1])))
        return maps

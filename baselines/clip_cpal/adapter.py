"""Context prototypes of CPAL on the maps of CLIP-ES: a reconstruction, not the authors' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from vpl_baselines.clip_cpal.bank import SupportBank
from vpl_baselines.clip_cpal.settings import Seeds, check_settings
from vpl_baselines.grad_cam import GradCAM

from vpl_lightning.cams import BaselineInfo
from vpl_lightning.clip import ClassSet, CLIPEncoder, DenseKind
from vpl_lightning.functional import context
from vpl_lightning.functional.affinity import Affinity, balance, refine_cams
from vpl_lightning.functional.gradcam import minmax
from vpl_lightning.functional.kmeans import spherical_kmeans
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray


class _Seeded(NamedTuple):
    """What one image gives without other images."""

    cams: Float[Tensor, "K h w"]
    affinity: Affinity
    features: Float[Tensor, "P D"]
    anchors: Float[Tensor, "K D"]
    """Instance prototypes, zero where no patch is sure enough; ``means`` before normalisation."""
    means: Float[Tensor, "K D"]


class ClipCPAL(GradCAM):
    """Moves CLIP-ES's maps to patches like a class's prototypes in other images; unfitted, in this one.

    Args:
        encoder: The frozen CLIP.
        classes: Class set.
        box_threshold: lambda of the affinity's boxes; None takes the class set's.
        features: Dense features that prototypes are means of.
        seeds: Which CLIP-ES maps say where a class is.
        seed_threshold: A patch belongs to a class where the map is at least this (phi).
        capacity: Instance prototypes a class in the support bank.
        clusters: Context prototypes a class.
        temperature: Of the positiveness softmax.
        neighbours: Context prototypes that stay in it (top-K).
        shift: What is added to dense features before the comparison.
        fusion: How the prototype-aware map meets Grad-CAM's.
        seed: Of the bank's choice and of k-means.
    """

    info = BaselineInfo(
        paper="Hunting Attributes: CPAL (CVPR 2024), arXiv 2403.07630",
        origin="reconstruction from published descriptions, not the authors' code",
        licence="MIT",
    )
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        encoder: CLIPEncoder,
        classes: ClassSet | str,
        *,
        box_threshold: float | None = None,
        features: DenseKind = "value",
        seeds: Seeds = "refined",
        seed_threshold: float = 0.4,
        capacity: int = 1000,
        clusters: int = 10,
        temperature: float = 0.1,
        neighbours: int = 5,
        shift: context.Shift = "instance",
        fusion: context.Fusion = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, classes)
        self.box_threshold = self.classes.box_threshold if box_threshold is None else box_threshold
        self.features, self.shift, self.fusion = features, shift, fusion
        self.seeds, self.seed_threshold = seeds, seed_threshold
        self.capacity, self.clusters, self.seed = capacity, clusters, seed
        self.temperature, self.neighbours = temperature, neighbours
        check_settings(vars(self))
        names, width = len(self.classes.foreground), encoder.joint_width
        self._bank = SupportBank(num_classes=names, width=width, capacity=capacity, seed=seed)
        self._contexts: dict[int, Tensor] = {}
        self._centres: dict[int, Tensor] = {}

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid."""
        maps = []
        for image, present, seeded in zip(images, labels, self._seed(encoded, labels), strict=True):
            aware = torch.stack([self._aware(seeded, *pair) for pair in enumerate(present.tolist())])
            cams = context.fuse(seeded.cams, minmax(aware.reshape(-1, *encoded.grid)), fusion=self.fusion)
            refined = refine_cams(cams, seeded.affinity, threshold=self.box_threshold)
            maps.append(ClassCAMs(present, cams, refined, (image.shape[0], image.shape[1])))
        return maps

    @torch.no_grad()
    def observe(
        self,
        keys: Sequence[str],
        images: Sequence[ImageArray],
        encoded: EncodedImages,
        labels: Sequence[Tensor],
    ) -> None:
        """Add the images' instance prototypes to the support bank."""
        for key, present, seeded in zip(keys, labels, self._seed(encoded, labels), strict=True):
            sure = seeded.anchors.any(-1)
            self._bank.add(key, present[sure], seeded.anchors[sure])

    def bank_state(self) -> dict[str, Tensor]:
        """Return the support bank."""
        return self._bank.state()

    def fit(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Merge support banks, cluster each class into its context prototypes."""
        for state in states:
            self._bank.merge(state)
        for label in range(len(self.classes.foreground)):
            rows = self._bank.rows(label)
            if len(rows):
                found = spherical_kmeans(rows, self.clusters, seed=self.seed)
                self._contexts[label], self._centres[label] = found.centres, rows.mean(0)

    def _seed(self, encoded: EncodedImages, labels: Sequence[Tensor]) -> Iterator[_Seeded]:
        trace = self.encoder.trace(encoded.tokens)
        features = self.encoder.dense(encoded, self.features, trace)
        attention = (encoded.attention + trace.attention.mean(1)) / encoded.attention_blocks
        for row, cams in enumerate(self.raw_cams(trace, encoded.grid, labels)):
            affinity, maps = balance(attention[row, 1:, 1:]), cams
            if self.seeds == "refined":
                maps = refine_cams(cams, affinity, threshold=self.box_threshold)
            found = context.instance_prototypes(features[row], maps.flatten(1), threshold=self.seed_threshold)
            yield _Seeded(cams, affinity, features[row], *found)

    def _aware(self, seeded: _Seeded, row: int, label: int) -> Float[Tensor, " P"]:
        anchor = seeded.anchors[row]
        if not anchor.any():
            return torch.zeros_like(seeded.features[:, 0])
        contexts = self._contexts.get(label, anchor[None]).to(anchor)
        tau, top = self.temperature, self.neighbours
        weights = context.positiveness(anchor, contexts, temperature=tau, neighbours=top)
        shift = context.feature_shift(self.shift, anchor, seeded.means[row], self._centres.get(label))
        return context.prototype_aware_cam(seeded.features, contexts, weights, shift=shift)

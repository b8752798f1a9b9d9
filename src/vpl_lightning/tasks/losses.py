"""The loss of phase 2: cross-entropy on pseudo-masks plus regional semantic contrast (VPL, eq. 14)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vpl_lightning.decoder import DecoderOutput
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.contrast import (
    MASK_BIAS,
    MASK_SCALE,
    TEMPERATURE,
    ContrastMode,
    MaskKind,
    region_class,
    region_masks,
    tcl_sampled,
)
from vpl_lightning.functional.pixel_loss import pixel_cross_entropy, shown_classes


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What phase 2 minimises. The weights are the paper's.

    Attributes:
        lambda_ce: Weight of the cross-entropy.
        lambda_rsc: Weight of the regional semantic contrast; 0 leaves it and its parameters out.
        balanced_ce: Average background and foreground apart, as WeCLIP does.
        rsc_mode: ``region_class``, which also works with one image a process, or ``tcl_sampled``, the
            paper's sums over images.
        rsc_mask: How similarities become masks.
        rsc_temperature: Divides the cosines of the contrast.
        rsc_gather: Contrast over the images of all ranks, not only of each.
    """

    lambda_ce: float = 1.0
    lambda_rsc: float = 1.0
    balanced_ce: bool = False
    rsc_mode: ContrastMode = "region_class"
    rsc_mask: MaskKind = "sigmoid"
    rsc_temperature: float = TEMPERATURE
    rsc_gather: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for key in ("lambda_ce", "lambda_rsc"):
            if not getattr(self, key) >= 0:
                raise ConfigurationError(f"losses.{key}={getattr(self, key)} must not be negative")
        if self.lambda_ce == self.lambda_rsc == 0:
            raise ConfigurationError(
                "losses.lambda_ce and losses.lambda_rsc are both 0; nothing would be learnt"
            )
        if not self.rsc_temperature > 0:
            raise ConfigurationError(f"losses.rsc_temperature={self.rsc_temperature} must be positive")
        if self.rsc_mode not in ("tcl_sampled", "region_class"):
            raise ConfigurationError(
                f"losses.rsc_mode={self.rsc_mode!r} must be 'tcl_sampled' or 'region_class'"
            )
        if self.rsc_mask not in ("sigmoid", "softmax"):
            raise ConfigurationError(f"losses.rsc_mask={self.rsc_mask!r} must be 'sigmoid' or 'softmax'")


class Losses(NamedTuple):
    """The terms, unweighted, and their weighted sum."""

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    rsc: Float[Tensor, ""] | None


class SegmentationLoss(nn.Module):
    """Computes the loss of a batch of views; owns the scale and bias of the masks, which learn.

    Args:
        spec: What is minimised.
        gather: Joins the rows of all ranks.
    """

    def __init__(self, spec: LossSpec, *, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.gather = gather if spec.rsc_gather else None
        if spec.lambda_rsc > 0:
            self.mask_scale = nn.Parameter(torch.tensor(MASK_SCALE))
            if spec.rsc_mask == "sigmoid":
                self.mask_bias = nn.Parameter(torch.tensor(MASK_BIAS))

    def forward(
        self,
        output: DecoderOutput,
        mask: Int64[Tensor, "B H W"],
        tags: Bool[Tensor, "B N"],
        prototypes: Float[Tensor, "C D"],
    ) -> Losses:
        """Compute the loss, in float32 whatever the precision around it.

        A view is contrasted with the classes that its own mask shows: the tags of the whole image say what
        it may show besides. Views without foreground take no part in the contrast.

        Args:
            output: Of the decoder.
            mask: Pseudo-masks of the views; 255 ignored.
            tags: Of the whole images.
            prototypes: Unit rows, foreground first.
        """
        with torch.autocast(mask.device.type, enabled=False):
            ce = pixel_cross_entropy(output.logits, mask, balanced=self.spec.balanced_ce)
            total = self.spec.lambda_ce * ce
            if self.spec.lambda_rsc == 0:
                return Losses(total, ce, None)
            if output.embedding is None:
                raise ConfigurationError(
                    "the contrast needs a decoder with an embedding; build it with embed=True"
                )
            rsc = self._contrast(output.embedding, shown_classes(mask, tags.shape[1]), tags, prototypes)
            return Losses(total + self.spec.lambda_rsc * rsc, ce, rsc)

    def _contrast(self, embedding: Tensor, shown: Tensor, tags: Tensor, prototypes: Tensor) -> Tensor:
        spec = self.spec
        bias = self.mask_bias if spec.rsc_mask == "sigmoid" else 0.0
        masks = region_masks(embedding, prototypes, kind=spec.rsc_mask, scale=self.mask_scale, bias=bias)
        if spec.rsc_mode == "tcl_sampled":
            return tcl_sampled(
                embedding,
                prototypes,
                masks,
                shown,
                tags,
                temperature=spec.rsc_temperature,
                gather=self.gather,
            )
        return region_class(
            embedding, prototypes, masks, shown, temperature=spec.rsc_temperature, gather=self.gather
        )

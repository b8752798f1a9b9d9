"""The segmentation decoder on hidden layers of the frozen CLIP: WeCLIP's, with two heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError

QUICK_GELU_SLOPE = 1.702
"""OpenAI's approximation of GELU: ``x * sigmoid(1.702 x)``."""
INITIAL_SCALE = 1 / 0.07
"""First factor of the cosines in the prototype head; CLIP's own initial value."""
MAX_SCALE = 100.0
"""The factor learns up to here, as CLIP's does."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Geometry of the decoder. The defaults are WeCLIP's.

    Attributes:
        width: Channels after every fusion MLP and in the blocks.
        blocks: Transformer blocks.
        heads: Attention heads of each.
        mlp_ratio: Width of a block's MLP over ``width``.
        dropout: Probability with which a fused channel is dropped in training.
        head: ``prototype``: the logit of a class is its scaled cosine with the vision prototype, which is
            how we read the paper's eq. 14; ``linear``: WeCLIP's 1x1 convolution.
        background_logit: What background means to the prototype head: ``logsumexp`` over the scaled cosines
            of the background prototypes (one softmax over all prototypes, background words added up), their
            ``max``, or the scaled cosine of one vector that is ``learnt``.
    """

    width: int = 256
    blocks: int = 3
    heads: int = 8
    mlp_ratio: int = 4
    dropout: float = 0.1
    head: Literal["prototype", "linear"] = "prototype"
    background_logit: Literal["logsumexp", "max", "learnt"] = "logsumexp"

    def __post_init__(self) -> None:
        """Refuse impossible geometry."""
        for key in ("width", "heads", "mlp_ratio"):
            if getattr(self, key) < 1:
                raise ConfigurationError(f"decoder.{key}={getattr(self, key)} must be at least 1")
        if self.blocks < 0:
            raise ConfigurationError(f"decoder.blocks={self.blocks} must not be negative")
        if self.width % self.heads:
            raise ConfigurationError(
                f"decoder.width={self.width} cannot be cut into decoder.heads={self.heads}; use a multiple"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"decoder.dropout={self.dropout} must lie in [0, 1)")
        if self.head not in ("prototype", "linear"):
            raise ConfigurationError(f"decoder.head={self.head!r} must be 'prototype' or 'linear'")
        if self.background_logit not in ("logsumexp", "max", "learnt"):
            raise ConfigurationError(
                f"decoder.background_logit={self.background_logit!r} must be 'logsumexp', 'max' or 'learnt'"
            )


class DecoderOutput(NamedTuple):
    """What the decoder says of images on the patch grid."""

    logits: Float[Tensor, "B N+1 h w"]
    """Background first, float32."""
    embedding: Float[Tensor, "B D h w"] | None
    """Unit vectors in the joint space, float32; None where the decoder has no such output."""


class LayerFusion(nn.Module):
    """Brings every hidden layer to one width, concatenates and mixes them.

    Args:
        in_width: V.
        layers: Hidden layers.
        width: Channels a layer and in the end.
        dropout: See :class:`DecoderSpec`.
    """

    def __init__(self, in_width: int, layers: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Linear(in_width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(layers)
        )
        self.mix = nn.Conv2d(layers * width, width, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, hidden: Sequence[Float[Tensor, "B V h w"]]) -> Float[Tensor, "B width h w"]:
        """Fuse the layers of a batch."""
        reduced = [
            reduce(layer.movedim(1, -1)).movedim(-1, 1)
            for reduce, layer in zip(self.reduce, hidden, strict=True)
        ]
        fused: Tensor = self.dropout(self.mix(torch.cat(reduced, dim=1)))
        return fused


class QuickGELU(nn.Module):
    """OpenAI's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


class DecoderBlock(nn.Module):
    """A pre-norm transformer block without positional embedding: it takes any grid.

    Args:
        width: Channels.
        heads: Attention heads.
        mlp_ratio: See :class:`DecoderSpec`.
    """

    def __init__(self, width: int, *, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), QuickGELU(), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, tokens: Float[Tensor, "B P width"]) -> Float[Tensor, "B P width"]:
        """Mix the tokens of each image."""
        normed = self.norm_1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        mixed: Tensor = tokens + self.mlp(self.norm_2(tokens))
        return mixed


class SegmentationDecoder(nn.Module):
    """Turns hidden layers of the frozen CLIP into logits of classes (WeCLIP's `segformer_head` and decoder).

    The prototype head compares every patch, projected into CLIP's joint space, with the vision prototypes,
    which stay as they are. The linear head uses that projection for the contrast alone.

    Args:
        in_width: V, width of the vision transformer.
        layers: Hidden layers that come in; depth - 1 (:meth:`CLIPEncoder.hidden`).
        prototypes: Unit rows, the ``num_labels`` foreground classes first.
        num_labels: Foreground classes, N.
        spec: Geometry.
        embed: Whether a linear head has the projection too.

    Raises:
        ConfigurationError: If the background logit needs prototypes of background words and there are none.
    """

    prototypes: Float[Tensor, "C D"]

    def __init__(
        self,
        in_width: int,
        layers: int,
        *,
        prototypes: Float[Tensor, "C D"],
        num_labels: int,
        spec: DecoderSpec | None = None,
        embed: bool = True,
    ) -> None:
        super().__init__()
        self.spec = spec = spec or DecoderSpec()
        self.num_labels = num_labels
        needs_words = spec.head == "prototype" and spec.background_logit != "learnt"
        if needs_words and len(prototypes) <= num_labels:
            raise ConfigurationError(
                f"decoder.background_logit={spec.background_logit!r} needs background words; the class set "
                "has none: add some or set it to 'learnt'"
            )
        self.register_buffer("prototypes", prototypes.detach().clone().float())
        self.fusion = LayerFusion(in_width, layers, width=spec.width, dropout=spec.dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(spec.width, heads=spec.heads, mlp_ratio=spec.mlp_ratio) for _ in range(spec.blocks)
        )
        joint_width = prototypes.shape[1]
        if spec.head == "linear":
            self.classify = nn.Conv2d(spec.width, num_labels + 1, 1)
        else:
            self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
            if spec.background_logit == "learnt":
                self.background = nn.Parameter(torch.randn(1, joint_width))
        self.embed = nn.Conv2d(spec.width, joint_width, 1) if embed or spec.head == "prototype" else None

    def forward(self, hidden: Sequence[Float[Tensor, "B V h w"]]) -> DecoderOutput:
        """Decode images of one patch grid.

        Args:
            hidden: :meth:`CLIPEncoder.hidden` of the images.
        """
        fused = self.fusion(hidden)
        tokens = fused.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        features = tokens.transpose(1, 2).unflatten(2, fused.shape[2:])
        embedding = None if self.embed is None else F.normalize(self.embed(features).float(), dim=1)
        if self.spec.head == "linear":
            return DecoderOutput(self.classify(features).float(), embedding)
        assert embedding is not None  # noqa: S101 - the prototype head always has the projection
        return DecoderOutput(self.compare(embedding), embedding)

    def compare(self, embedding: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N+1 h w"]:
        """Return the prototype head's logits, in float32 whatever the precision around it."""
        with torch.autocast(embedding.device.type, enabled=False):
            rows = self.prototypes
            if self.spec.background_logit == "learnt":
                rows = torch.cat([rows[: self.num_labels], F.normalize(self.background.float(), dim=-1)])
            scale = self.log_scale.exp().clamp(max=MAX_SCALE)
            logits = scale * torch.einsum("bdhw,cd->bchw", embedding, rows)
            foreground, words = logits[:, : self.num_labels], logits[:, self.num_labels :]
            if self.spec.background_logit == "max":
                background = words.amax(1, keepdim=True)
            else:
                background = words.logsumexp(1, keepdim=True)
            return torch.cat([background, foreground], dim=1)

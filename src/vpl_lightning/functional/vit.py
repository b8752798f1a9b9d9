"""A pre-norm CLIP transformer block as plain functions of its weights.

open_clip's blocks return no attention, changed their attention class in version 4, and OpenAI's blocks differ
between forks. Parameter names are the same everywhere, so the weights are read and the arithmetic is done here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["quick_gelu", "gelu"]

QUICK_GELU_SLOPE = 1.702
"""Slope of the sigmoid in OpenAI's QuickGELU, ``x * sigmoid(1.702 x)``."""


class NormWeights(NamedTuple):
    """Affine layer normalisation."""

    weight: Float[Tensor, " V"]
    bias: Float[Tensor, " V"]
    eps: float


class BlockWeights(NamedTuple):
    """One residual attention block of a CLIP vision transformer."""

    norm_1: NormWeights
    in_weight: Float[Tensor, "V3 V"]
    in_bias: Float[Tensor, " V3"]
    out_weight: Float[Tensor, "V V"]
    out_bias: Float[Tensor, " V"]
    norm_2: NormWeights
    fc_weight: Float[Tensor, "V4 V"]
    fc_bias: Float[Tensor, " V4"]
    proj_weight: Float[Tensor, "V V4"]
    proj_bias: Float[Tensor, " V"]
    heads: int
    activation: Activation


class HeadWeights(NamedTuple):
    """What follows the last block: ``ln_post`` and the projection to the joint space."""

    norm: NormWeights
    projection: Float[Tensor, "V D"]


class BlockTrace(NamedTuple):
    """Every intermediate value of one block that Grad-CAM, the affinity or the dense features need."""

    inputs: Float[Tensor, "B T V"]
    """Residual stream before the block."""
    normed: Float[Tensor, "B T V"]
    """Output of ``ln_1``: the target layer of CLIP-ES."""
    query: Float[Tensor, "B G T d"]
    """Per head ``G``, not yet divided by ``sqrt(d)``."""
    key: Float[Tensor, "B G T d"]
    value: Float[Tensor, "B G T d"]
    attention: Float[Tensor, "B G T T"]
    """Rows are queries."""
    mixed: Float[Tensor, "B G T d"]
    """``attention @ value`` per head."""
    middle: Float[Tensor, "B T V"]
    """Residual stream after attention."""
    outputs: Float[Tensor, "B T V"]
    """Residual stream after the block."""


def layer_norm(x: Float[Tensor, "*B V"], norm: NormWeights) -> Float[Tensor, "*B V"]:
    """Layer normalisation over the last axis."""
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def activate(x: Float[Tensor, "*B V"], activation: Activation) -> Float[Tensor, "*B V"]:
    """Apply the non-linearity of the MLP."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x) if activation == "quick_gelu" else F.gelu(x)


def activation_slope(x: Float[Tensor, "*B V"], activation: Activation) -> Float[Tensor, "*B V"]:
    """Derivative of :func:`activate`."""
    if activation == "quick_gelu":
        gate = torch.sigmoid(QUICK_GELU_SLOPE * x)
        return gate * (1 + QUICK_GELU_SLOPE * x * (1 - gate))
    cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return cdf + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5


def split_heads(x: Float[Tensor, "B T V"], heads: int) -> Float[Tensor, "B G T d"]:
    """Cut the width into heads."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B G T d"]) -> Float[Tensor, "B T V"]:
    """Undo :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def mlp(x: Float[Tensor, "B T V"], block: BlockWeights) -> Float[Tensor, "B T V"]:
    """Feed-forward half of a block, without its normalisation and residual."""
    hidden = activate(F.linear(x, block.fc_weight, block.fc_bias), block.activation)
    return F.linear(hidden, block.proj_weight, block.proj_bias)


def trace_block(
    inputs: Float[Tensor, "B T V"], block: BlockWeights, *, normed: Float[Tensor, "B T V"] | None = None
) -> BlockTrace:
    """Run one block and keep its intermediate values.

    Args:
        inputs: Residual stream before the block.
        block: Weights of the block.
        normed: Stands in for ``ln_1(inputs)``, so that a caller can differentiate with respect to it while the
            residual path stays constant, which is what Grad-CAM at ``ln_1`` does.
    """
    if normed is None:
        normed = layer_norm(inputs, block.norm_1)
    query, key, value = (
        split_heads(part, block.heads) for part in F.linear(normed, block.in_weight, block.in_bias).chunk(3, dim=-1)
    )
    attention = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    mixed = attention @ value
    middle = inputs + F.linear(merge_heads(mixed), block.out_weight, block.out_bias)
    outputs = middle + mlp(layer_norm(middle, block.norm_2), block)
    return BlockTrace(inputs, normed, query, key, value, attention, mixed, middle, outputs)


def block_weights(block: Any, *, heads: int | None = None, activation: Activation | None = None) -> BlockWeights:
    """Read the weights of an OpenAI-style or open_clip residual attention block.

    Args:
        block: A module with ``ln_1``, ``attn`` (``in_proj_weight``, ``out_proj``), ``ln_2`` and ``mlp``
            (``c_fc``, ``c_proj``).
        heads: Number of heads; read from ``block.attn.num_heads`` unless given.
        activation: Read from the class name of ``block.mlp.gelu`` unless given.

    Raises:
        AttributeError: If the block has other parts.
        ValueError: If it has parts that this arithmetic leaves out (layer scale, normalised queries).
    """
    for part in ("ls_1", "ls_2"):
        if not isinstance(getattr(block, part, torch.nn.Identity()), torch.nn.Identity):
            raise ValueError(f"the block has a {part} (layer scale), which CLIP's blocks do not have")
    names = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
    found = type(block.mlp.gelu).__name__
    if activation is None and found not in names:
        raise ValueError(f"unknown activation {found} in the block; pass activation='quick_gelu' or 'gelu'")
    attention = block.attn
    return BlockWeights(
        norm_1=norm_weights(block.ln_1),
        in_weight=attention.in_proj_weight,
        in_bias=attention.in_proj_bias,
        out_weight=attention.out_proj.weight,
        out_bias=attention.out_proj.bias,
        norm_2=norm_weights(block.ln_2),
        fc_weight=block.mlp.c_fc.weight,
        fc_bias=block.mlp.c_fc.bias,
        proj_weight=block.mlp.c_proj.weight,
        proj_bias=block.mlp.c_proj.bias,
        heads=heads or int(attention.num_heads),
        activation=activation or names[found],  # type: ignore[arg-type]
    )


def norm_weights(norm: Any) -> NormWeights:
    """Read an affine ``LayerNorm``."""
    return NormWeights(norm.weight, norm.bias, float(norm.eps))


def dense_features(
    tokens: Float[Tensor, "B T V"], head: HeadWeights, *, normalise: bool = True
) -> Float[Tensor, "B P D"]:
    """Project patch tokens to the joint space, unit rows unless told otherwise."""
    features = layer_norm(tokens[:, 1:], head.norm) @ head.projection
    return F.normalize(features, dim=-1) if normalise else features


def value_path(trace: BlockTrace, block: BlockWeights) -> Float[Tensor, "B T V"]:
    """Attention output if every token attended to itself alone (MaskCLIP's reading of the last block)."""
    return F.linear(merge_heads(trace.value), block.out_weight, block.out_bias)

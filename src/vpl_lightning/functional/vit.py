"""A pre-norm CLIP transformer block as plain functions of its weights.

open_clip's blocks return no attention, changed their attention class in version 4, and OpenAI's blocks differ
between forks. Parameter names are the same everywhere, so the weights are read and the arithmetic is done
here.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.linear import linear

Activation = Literal["quick_gelu", "gelu"]

QUICK_GELU_SLOPE = 1.702
"""Slope of the sigmoid in OpenAI's QuickGELU, ``x * sigmoid(1.702 x)``."""

PARAMETERS = {
    "in_weight": "attn.in_proj_weight",
    "in_bias": "attn.in_proj_bias",
    "out_weight": "attn.out_proj.weight",
    "out_bias": "attn.out_proj.bias",
    "fc_weight": "mlp.c_fc.weight",
    "fc_bias": "mlp.c_fc.bias",
    "proj_weight": "mlp.c_proj.weight",
    "proj_bias": "mlp.c_proj.bias",
}
"""Names of a block's matrices and biases, the same in OpenAI's code, its forks and open_clip."""
NORMS = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
"""Names of a block's other parameters."""


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
    hidden: Float[Tensor, "B T V4"]
    """Inside the MLP, before its activation."""
    outputs: Float[Tensor, "B T V"]
    """Residual stream after the block."""


def layer_norm(x: Float[Tensor, "*B V"], norm: NormWeights) -> Float[Tensor, "*B V"]:
    """Layer normalisation over the last axis."""
    normed: Tensor = F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
    return normed


def activate(x: Float[Tensor, "*B V"], activation: Activation) -> Float[Tensor, "*B V"]:
    """Apply the non-linearity of the MLP."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    plain: Tensor = F.gelu(x)
    return plain


def activation_slope(x: Float[Tensor, "*B V"], activation: Activation) -> Float[Tensor, "*B V"]:
    """Derivative of :func:`activate`."""
    if activation == "quick_gelu":
        scaled = QUICK_GELU_SLOPE * x
        gate: Tensor = torch.sigmoid(scaled)
        return gate.addcmul(gate, scaled.addcmul(scaled, gate, value=-1))
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)


def split_heads(x: Float[Tensor, "B T V"], heads: int) -> Float[Tensor, "B G T d"]:
    """Cut the width into heads."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B G T d"]) -> Float[Tensor, "B T V"]:
    """Undo :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)


def mlp(x: Float[Tensor, "B T V"], block: BlockWeights) -> Float[Tensor, "B T V"]:
    """Feed-forward half of a block, without its normalisation and residual."""
    hidden = activate(linear(x, block.fc_weight, block.fc_bias), block.activation)
    return linear(hidden, block.proj_weight, block.proj_bias)


def trace_block(
    inputs: Float[Tensor, "B T V"], block: BlockWeights, *, normed: Float[Tensor, "B T V"] | None = None
) -> BlockTrace:
    """Run one block and keep its intermediate values.

    Args:
        inputs: Residual stream before the block.
        block: Weights of the block.
        normed: Stands in for ``ln_1(inputs)``, so that a caller can differentiate with respect to it while
            the residual path stays constant, which is what Grad-CAM at ``ln_1`` does.
    """
    if normed is None:
        normed = layer_norm(inputs, block.norm_1)
    query, key, value = (
        split_heads(part, block.heads)
        for part in linear(normed, block.in_weight, block.in_bias).chunk(3, dim=-1)
    )
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    # Fresh memory costs a CPU more than the sums.
    in_place = scores.device.type == "cpu" and not scores.requires_grad
    attention = torch.softmax(scores, -1, out=scores) if in_place else scores.softmax(-1)
    mixed = attention @ value
    middle = inputs + linear(merge_heads(mixed), block.out_weight, block.out_bias)
    hidden = linear(layer_norm(middle, block.norm_2), block.fc_weight, block.fc_bias)
    outputs = middle + linear(activate(hidden, block.activation), block.proj_weight, block.proj_bias)
    return BlockTrace(inputs, normed, query, key, value, attention, mixed, middle, hidden, outputs)


def forward_block(
    inputs: Float[Tensor, "B T V"], block: BlockWeights, *, causal: bool = False
) -> Float[Tensor, "B T V"]:
    """Run one block without keeping its attention.

    The residual stream and the norms stay float32; products run in the type of the block's matrices.

    Args:
        inputs: Residual stream before the block.
        block: Weights of the block.
        causal: A token attends to itself and those before it alone, as in the text tower.
    """
    query, key, value = _heads(inputs, block)
    return _finish(inputs, F.scaled_dot_product_attention(query, key, value, is_causal=causal), block)


def forward_block_with_attention(
    inputs: Float[Tensor, "B T V"], block: BlockWeights
) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T T"]]:
    """Run one block and return its attention averaged over the heads, rows queries, float32.

    One head at a time: the maps of all heads never exist together, which saves memory and, on a CPU, time.
    """
    query, key, value = _heads(inputs, block)
    scale = query.shape[-1] ** -0.5
    shape = (inputs.shape[0], inputs.shape[1], inputs.shape[1])
    scores, mixed = query.new_empty(shape), torch.empty_like(value)
    attention = torch.empty(shape, device=inputs.device)
    total = torch.zeros_like(attention)
    for head in range(block.heads):
        torch.bmm(query[:, head] * scale, key[:, head].mT, out=scores)
        torch.softmax(scores, -1, dtype=torch.float32, out=attention)
        total += attention
        torch.bmm(attention.to(value.dtype), value[:, head], out=mixed[:, head])
    return _finish(inputs, mixed, block), total / block.heads


def _heads(inputs: Tensor, block: BlockWeights) -> list[Tensor]:
    normed = layer_norm(inputs, block.norm_1).to(block.in_weight.dtype)
    parts = linear(normed, block.in_weight, block.in_bias).chunk(3, dim=-1)
    return [split_heads(part, block.heads) for part in parts]


def _finish(inputs: Tensor, mixed: Tensor, block: BlockWeights) -> Tensor:
    middle = inputs + linear(merge_heads(mixed), block.out_weight, block.out_bias)
    return middle + mlp(layer_norm(middle, block.norm_2).to(block.fc_weight.dtype), block)


def cast_block(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """Return the block with its matrices and biases in another type and its norms in float32."""
    values = block._asdict()
    for name, value in values.items():
        if isinstance(value, NormWeights):
            values[name] = NormWeights(value.weight.float(), value.bias.float(), value.eps)
        elif isinstance(value, Tensor):
            values[name] = value.to(dtype)
    return BlockWeights(**values)


def block_weights(
    block: Any, *, heads: int | None = None, activation: Activation | None = None
) -> BlockWeights:
    """Read the weights of an OpenAI-style or open_clip residual attention block.

    Args:
        block: A module with ``ln_1``, ``attn`` (``in_proj_weight``, ``out_proj``), ``ln_2`` and ``mlp``
            (``c_fc``, ``c_proj``).
        heads: Number of heads; read from ``block.attn.num_heads`` unless given.
        activation: Read from the class name of ``block.mlp.gelu`` unless given.

    Raises:
        AttributeError: If the block lacks a parameter.
        ValueError: If it has parameters that this arithmetic leaves out (layer scale, normalised queries), an
            unknown activation, or a width that the heads do not divide.
    """
    parameters = dict(block.named_parameters())
    names = [*PARAMETERS.values(), *NORMS]
    missing = [name for name in names if name not in parameters]
    if missing:
        raise AttributeError(f"the block has no parameter {', '.join(missing)}")
    extra = sorted(set(parameters) - set(names))
    if extra:
        raise ValueError(f"the block has {', '.join(extra)}, which CLIP's blocks do not have")
    values = {key: parameters[name] for key, name in PARAMETERS.items()}
    heads = heads or int(block.attn.num_heads)
    if values["out_weight"].shape[0] % heads:
        raise ValueError(f"a width of {values['out_weight'].shape[0]} cannot be cut into {heads} heads")
    return BlockWeights(
        norm_1=norm_weights(block.ln_1),
        norm_2=norm_weights(block.ln_2),
        heads=heads,
        activation=activation or _activation_name(block.mlp.gelu),
        **values,
    )


def _activation_name(module: Any) -> Activation:
    name = type(module).__name__
    if name == "QuickGELU":
        return "quick_gelu"
    if name == "GELU" and getattr(module, "approximate", "none") == "none":
        return "gelu"
    raise ValueError(f"unknown activation {module} in the block; pass quick_gelu=True or False")


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
    return linear(merge_heads(trace.value), block.out_weight, block.out_bias)

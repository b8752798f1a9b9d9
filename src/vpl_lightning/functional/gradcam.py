"""Grad-CAM at the last block's ``ln_1``, as CLIP-ES takes it; class weights in closed form or by autograd."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.vit import (
    BlockTrace,
    BlockWeights,
    HeadWeights,
    NormWeights,
    activation_slope,
    layer_norm,
    split_heads,
    trace_block,
)

Score = Literal["log_probability", "probability"]
"""What is differentiated. The map is the same after min-max, but a probability underflows in float32."""

MINMAX_EPS = 1e-7
"""Added to the maximum by CLIP-ES's `scale_cam_image`."""


def class_log_probabilities(
    outputs: Float[Tensor, "T V"],
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Int[Tensor, " K"],
    *,
    num_labels: int,
    scale: float,
) -> Float[Tensor, " K"]:
    """Log-softmax of the present classes among themselves and all background words.

    The image feature is the mean of the patch tokens after ``ln_post``, projected and normalised; absent classes are
    not in the softmax.
    """
    feature = F.normalize(layer_norm(outputs, head.norm)[1:].mean(0) @ head.projection, dim=-1)
    rivals = torch.cat([prototypes[present], prototypes[num_labels:]])
    return (scale * (rivals @ feature)).log_softmax(-1)[: len(present)]


def gradcam_weights_autograd(
    inputs: Float[Tensor, "T V"],
    block: BlockWeights,
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Int[Tensor, " K"],
    *,
    num_labels: int,
    scale: float,
    score: Score = "log_probability",
) -> Float[Tensor, "K V"]:
    """Mean over patches of the gradient at ``ln_1``'s output, one backward pass a class: the reference path."""
    with torch.inference_mode(False), torch.enable_grad():
        tokens = inputs.detach().clone()[None]
        normed = layer_norm(tokens, block.norm_1).detach().requires_grad_()
        outputs = trace_block(tokens, block, normed=normed).outputs[0]
        scores = class_log_probabilities(outputs, head, prototypes, present, num_labels=num_labels, scale=scale)
        if score == "probability":
            scores = scores.exp()
        grads = [torch.autograd.grad(one, normed, retain_graph=True)[0][0, 1:].mean(0) for one in scores]
    return torch.stack(grads)


def gradcam_weights(
    trace: BlockTrace,
    image: int,
    block: BlockWeights,
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Int[Tensor, " K"],
    *,
    num_labels: int,
    scale: float,
    score: Score = "log_probability",
) -> Float[Tensor, "K V"]:
    """Mean over patches of the gradient at ``ln_1``'s output, all classes at once and without a graph.

    Every patch receives the same gradient from the mean, and the mean over patches commutes with all that is linear
    behind the last non-linearity; what is left of a backward pass is one product of the MLP a class, and sums.

    Args:
        trace: The last block on a batch of images.
        image: Position in the batch.
        block: Weights of the block.
        head: ``ln_post`` and projection.
        prototypes: Unit rows.
        present: Foreground ids of the image.
        num_labels: N.
        scale: Factor of the cosines.
        score: What is differentiated.
    """
    unit, spread = _standardise(trace.outputs[image], head.norm.eps)
    patches = len(unit) - 1
    upstream, log_probabilities = _score_gradient(
        unit, head, prototypes, present, num_labels=num_labels, scale=scale
    )
    # ln_post backward: delta_j = (centred - share_j * unit_j) / spread_j for patches, zero for the class token.
    shift = upstream * head.norm.weight
    centred = shift - shift.mean(-1, keepdim=True)
    share = unit @ shift.T / unit.shape[-1]
    spread = spread.clone()
    spread[0] = torch.inf
    middle = trace.middle[image]
    back = _mlp_backward(middle, unit, spread, centred, share, block)
    delta = (centred[:, None] - share.T[..., None] * unit) / spread
    back += delta
    sums = _attention_backward(trace, image, split_heads(back @ block.out_weight, block.heads))
    weights = sums @ block.in_weight / patches
    return weights * log_probabilities.exp()[:, None] if score == "probability" else weights


def cams_from_weights(
    normed: Float[Tensor, "T V"], weights: Float[Tensor, "K V"], grid: tuple[int, int]
) -> Float[Tensor, "K h w"]:
    """ReLU of the weighted sum of channels at the patches, each map scaled to [0, 1]."""
    return minmax(F.relu(weights @ normed[1:].T).unflatten(1, grid))


def minmax(maps: Float[Tensor, "K h w"]) -> Float[Tensor, "K h w"]:
    """Subtract the minimum, then divide by the maximum plus 1e-7, map by map (CLIP-ES's `scale_cam_image`)."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (MINMAX_EPS + maps.amax((-2, -1), keepdim=True))


def _standardise(x: Float[Tensor, "T V"], eps: float) -> tuple[Float[Tensor, "T V"], Float[Tensor, "T 1"]]:
    """Normalised tokens without the affine part, and what they were divided by."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    spread = (variance + eps).sqrt()
    return (x - mean) / spread, spread


def _score_gradient(
    unit: Tensor, head: HeadWeights, prototypes: Tensor, present: Tensor, *, num_labels: int, scale: float
) -> tuple[Float[Tensor, "K V"], Float[Tensor, " K"]]:
    """Gradient of the log-probabilities in each patch's ``ln_post`` output, the same for every patch."""
    pooled = (unit[1:].mean(0) * head.norm.weight + head.norm.bias) @ head.projection
    length = pooled.norm()
    feature = pooled / length
    rivals = torch.cat([prototypes[present], prototypes[num_labels:]])
    log_probabilities = (scale * (rivals @ feature)).log_softmax(-1)
    slope = scale * (rivals[: len(present)] - log_probabilities.exp() @ rivals)
    slope = (slope - (slope @ feature)[:, None] * feature) / length
    return slope @ head.projection.T / (len(unit) - 1), log_probabilities[: len(present)]


def _mlp_backward(
    middle: Tensor, unit: Tensor, spread: Tensor, centred: Tensor, share: Tensor, block: BlockWeights
) -> Float[Tensor, "K T V"]:
    """Gradient in the residual stream before the MLP, through the MLP alone (not its shortcut).

    ``W2^T delta_j`` splits into a vector of the class and a class-free product; so does the product with ``W1``.
    Classes are taken one at a time through the only large product that is left, so that no array grows with
    classes x tokens x MLP width.
    """
    scaled, middle_spread = _standardise(middle, block.norm_2.eps)
    hidden = F.linear(scaled * block.norm_2.weight + block.norm_2.bias, block.fc_weight, block.fc_bias)
    slope = activation_slope(hidden, block.activation).div_(spread)
    common = (slope * (unit @ block.proj_weight)) @ block.fc_weight
    buffer = torch.empty_like(slope)
    parts = []
    for one, own in zip(centred @ block.proj_weight, share.T, strict=True):
        torch.mul(slope, one, out=buffer)
        parts.append(torch.addcmul(buffer @ block.fc_weight, own[:, None], common, value=-1))
    return _norm_backward(torch.stack(parts), scaled, middle_spread, block.norm_2)


def _norm_backward(grads: Tensor, unit: Tensor, spread: Tensor, norm: NormWeights) -> Float[Tensor, "K T V"]:
    grads = grads * norm.weight
    along = (grads * unit).mean(-1, keepdim=True)
    return (grads - grads.mean(-1, keepdim=True) - along * unit) / spread


def _attention_backward(
    trace: BlockTrace, image: int, back: Float[Tensor, "K G T d"]
) -> Float[Tensor, "K V3"]:
    """Sums over patches of the gradients of query, key and value, side by side.

    Rows of the attention sum to one, so the sum over patch keys is minus the class token's column; the class token
    receives no gradient as a query.
    """
    query, key, value = trace.query[image], trace.key[image], trace.value[image]
    attention, mixed = trace.attention[image], trace.mixed[image]
    to_class = attention[:, :, 0]
    radial = (back * mixed).sum(-1)
    value_sum = torch.einsum("gt,kgtd->kgd", 1 - to_class, back)
    stacked = torch.cat([back, radial[..., None]], -1).permute(1, 2, 0, 3).flatten(2)
    spread = (attention.mT @ stacked).unflatten(-1, (len(back), -1)).permute(2, 0, 1, 3)
    columns = (spread[..., :-1] * value).sum(-1) - spread[..., -1]
    scale = query.shape[-1] ** -0.5
    query_sum = scale * torch.einsum("kgt,gtd->kgd", columns, key)
    towards = to_class * ((back * value[:, None, 0]).sum(-1) - radial)
    key_sum = -scale * torch.einsum("kgt,gtd->kgd", towards, query)
    return torch.cat([part.flatten(1) for part in (query_sum, key_sum, value_sum)], dim=-1)

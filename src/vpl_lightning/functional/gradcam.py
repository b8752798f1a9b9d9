"""Grad-CAM at the last block's ``ln_1``, as CLIP-ES takes it; class weights in closed form or by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.linear import linear
from vpl_lightning.functional.vit import (
    BlockTrace,
    BlockWeights,
    HeadWeights,
    NormWeights,
    activation_slope,
    layer_norm,
    trace_block,
)

Score = Literal["log_probability", "probability"]
"""What is differentiated. The map is the same after min-max, but a probability underflows in float32."""

MINMAX_EPS = 1e-7
"""Added to the maximum by CLIP-ES's `scale_cam_image`."""
LARGEST_ARRAY = 1 << 22
"""Elements that an array over images, classes, patches and MLP width may have before it is cut up (16 MB)."""


def class_log_probabilities(
    outputs: Float[Tensor, "T V"],
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Int[Tensor, " K"],
    *,
    num_labels: int,
    scale: float,
) -> Float[Tensor, " K"]:
    """Log-softmax of the present classes among themselves and all background words (CLIP-ES).

    The image feature is the mean of the patch tokens after ``ln_post``, projected and normalised; absent
    classes are not in the softmax.
    """
    feature = F.normalize(layer_norm(outputs, head.norm)[1:].mean(0) @ head.projection, dim=-1)
    rivals = torch.cat([prototypes[present], prototypes[num_labels:]])
    return (scale * (rivals @ feature)).log_softmax(-1)[: len(present)]


def gradcam_weights_autograd(
    trace: BlockTrace,
    block: BlockWeights,
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Sequence[Int[Tensor, " K"]],
    *,
    num_labels: int,
    scale: float,
    score: Score = "log_probability",
) -> list[Float[Tensor, "K V"]]:
    """Return what :func:`gradcam_weights` returns, by one backward pass a class: the reference path.

    Works inside ``no_grad`` and ``inference_mode`` too; arguments as there.
    """
    weights = []
    with torch.inference_mode(False), torch.enable_grad():
        rows = prototypes.clone()
        for image, ids in enumerate(present):
            tokens = trace.inputs[image : image + 1].detach().clone()
            normed = trace.normed[image : image + 1].detach().clone().requires_grad_()
            outputs = trace_block(tokens, block, normed=normed).outputs[0]
            scores = class_log_probabilities(
                outputs, head, rows, ids.clone(), num_labels=num_labels, scale=scale
            )
            if score == "probability":
                scores = scores.exp()
            grads = [torch.autograd.grad(one, normed, retain_graph=True)[0][0, 1:].mean(0) for one in scores]
            weights.append(torch.stack(grads))
    return weights


def gradcam_weights(
    trace: BlockTrace,
    block: BlockWeights,
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Sequence[Int[Tensor, " K"]],
    *,
    num_labels: int,
    scale: float,
    score: Score = "log_probability",
) -> list[Float[Tensor, "K V"]]:
    """Mean over patches of the gradient of each class's score at ``ln_1``'s output, without a graph.

    The score's gradient is the same at every patch because the image feature is a mean, and the mean over
    patches commutes with all that is linear before the MLP's non-linearity. What is left of a backward pass
    is one product with the MLP's first matrix a class, two small ones, and sums. Work that does not depend
    on the class is done once an image; images with equally many classes go together.

    Args:
        trace: The last block on a batch of images.
        block: Weights of the block.
        head: ``ln_post`` and projection.
        prototypes: Unit rows, ``num_labels`` foreground classes first.
        present: Foreground ids of each image.
        num_labels: N.
        scale: Factor of the cosines in the softmax.
        score: What is differentiated.

    Returns:
        For each image the channel weights of its classes, in the order given.
    """
    unit, spread = _standardise(trace.outputs[:, 1:], head.norm.eps)
    upstream, log_probabilities = _score_gradient(unit, head, prototypes, present, num_labels, scale)
    size = unit.shape[1] * block.fc_weight.shape[0]
    counts = [len(ids) for ids in present]
    starts = [sum(counts[:image]) for image in range(len(counts))]
    weights: list[Tensor] = [upstream] * len(counts)
    for rows in _equal_counts(counts, largest=LARGEST_ARRAY // size):
        shared = _class_free(trace, unit, spread, block, rows)
        step = max(1, LARGEST_ARRAY // (size * len(rows)))
        sums = []
        for first in range(0, counts[rows[0]], step):
            last = min(first + step, counts[rows[0]])
            own = torch.stack([upstream[starts[row] + first : starts[row] + last] for row in rows])
            sums.append(_attention_backward(shared, _residual_gradient(shared, own, block), block))
        for row, found in zip(rows, torch.cat(sums, dim=1) @ block.in_weight / unit.shape[1], strict=True):
            own = log_probabilities[starts[row] : starts[row] + counts[row], None]
            weights[row] = found * own.exp() if score == "probability" else found
    return weights


def cams_from_weights(
    normed: Float[Tensor, "T V"], weights: Float[Tensor, "K V"], grid: tuple[int, int]
) -> Float[Tensor, "K h w"]:
    """ReLU of the weighted sum of channels at the patches, each map scaled to [0, 1].

    Scaled twice, as CLIP-ES does: the second time gives back what the 1e-7 took from maps of tiny values.
    """
    return minmax(minmax(F.relu(weights @ normed[1:].T).reshape(-1, *grid)))


def minmax(maps: Float[Tensor, "K h w"]) -> Float[Tensor, "K h w"]:
    """Subtract the minimum, divide by the maximum plus 1e-7, map by map (CLIP-ES's `scale_cam_image`)."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (MINMAX_EPS + maps.amax((-2, -1), keepdim=True))


class _ClassFree(NamedTuple):
    """What the classes of ``n`` images have in common."""

    unit: Float[Tensor, "n P V"]
    """Patch tokens after the block, standardised by ``ln_post``."""
    spread: Float[Tensor, "n P 1"]
    """What ``ln_post`` divided them by."""
    through: Float[Tensor, "n P V4"]
    """``unit`` through the transposed second matrix of the MLP."""
    slope: Float[Tensor, "n P V4"]
    """Derivative of the activation, over ``spread``."""
    middle: Float[Tensor, "n P V"]
    """Patch tokens before the MLP, standardised by ``ln_2``."""
    middle_spread: Float[Tensor, "n P 1"]
    trace: BlockTrace


def _class_free(
    trace: BlockTrace, unit: Tensor, spread: Tensor, block: BlockWeights, rows: Sequence[int]
) -> _ClassFree:
    part = BlockTrace(*(_take(value, rows) for value in trace))
    unit, spread = _take(unit, rows), _take(spread, rows)
    middle, middle_spread = _standardise(part.middle[:, 1:], block.norm_2.eps)
    slope = activation_slope(part.hidden[:, 1:], block.activation).div_(spread)
    return _ClassFree(unit, spread, linear(unit, block.proj_weight.T), slope, middle, middle_spread, part)


def _take(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Return rows of a batch, a view where they are neighbours."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return value[rows[0] : rows[-1] + 1]
    return value[list(rows)]


def _equal_counts(counts: Sequence[int], *, largest: int) -> Iterator[list[int]]:
    """Yield groups of images with equally many classes, of at most ``largest`` classes in all if possible."""
    for count in sorted(set(counts)):
        rows = [row for row, own in enumerate(counts) if own == count]
        step = max(1, largest // count)
        for first in range(0, len(rows), step):
            yield rows[first : first + step]


def _standardise(
    x: Float[Tensor, "B P V"], eps: float
) -> tuple[Float[Tensor, "B P V"], Float[Tensor, "B P 1"]]:
    """Normalised tokens without the affine part, and what they were divided by."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    spread = (variance + eps).sqrt()
    return (x - mean) / spread, spread


def _score_gradient(
    unit: Float[Tensor, "B P V"],
    head: HeadWeights,
    prototypes: Float[Tensor, "C D"],
    present: Sequence[Int[Tensor, " K"]],
    num_labels: int,
    scale: float,
) -> tuple[Float[Tensor, "pairs V"], Float[Tensor, " pairs"]]:
    """Gradient of each log-probability in the standardised tokens of ``ln_post``, the same for every patch.

    Pairs of image and class run image by image; the second value is the
    log-probabilities themselves.
    """
    pooled = (unit.mean(1) * head.norm.weight + head.norm.bias) @ head.projection
    length = pooled.norm(dim=-1, keepdim=True)
    feature = pooled / length
    owner = torch.arange(len(present), device=unit.device).repeat_interleave(
        torch.tensor([len(ids) for ids in present], device=unit.device)
    )
    label = torch.cat(list(present))
    absent = torch.ones(len(present), len(prototypes), dtype=torch.bool, device=unit.device)
    absent[:, num_labels:] = False
    absent[owner, label] = False
    scores = (scale * (feature @ prototypes.T)).masked_fill(absent, -torch.inf).log_softmax(-1)
    slope = scale * (prototypes[label] - (scores.exp() @ prototypes)[owner])
    along = (slope * feature[owner]).sum(-1, keepdim=True)
    slope = (slope - along * feature[owner]) / length[owner]
    return slope @ head.projection.T * head.norm.weight / unit.shape[1], scores[owner, label]


def _residual_gradient(
    shared: _ClassFree, upstream: Float[Tensor, "n K V"], block: BlockWeights
) -> Float[Tensor, "n K P V"]:
    """Gradient in the residual stream between attention and MLP; zero at the class token, which is left out.

    ``ln_post`` turns the upstream vector into ``(centred - share_j * unit_j) / spread_j`` at patch ``j``, so
    its product with the MLP's second matrix splits into a vector of the class and a class-free product.
    """
    centred = upstream - upstream.mean(-1, keepdim=True)
    share = (upstream @ shared.unit.mT / upstream.shape[-1])[..., None]
    own = (centred @ block.proj_weight)[:, :, None]
    inner = torch.addcmul(own, share, shared.through[:, None], value=-1).mul_(shared.slope[:, None])
    back = _norm_backward(
        linear(inner, block.fc_weight.T), shared.middle[:, None], shared.middle_spread[:, None], block.norm_2
    )
    shortcut = torch.addcmul(centred[:, :, None], share, shared.unit[:, None], value=-1)
    return back.add_(shortcut.div_(shared.spread[:, None]))


def _norm_backward(
    grads: Tensor, unit: Tensor, spread: Tensor, norm: NormWeights
) -> Float[Tensor, "n K P V"]:
    grads = grads * norm.weight
    along = (grads * unit).mean(-1, keepdim=True)
    return (grads - grads.mean(-1, keepdim=True)).addcmul_(along, unit, value=-1).div_(spread)


def _attention_backward(
    shared: _ClassFree, back: Float[Tensor, "n K P V"], block: BlockWeights
) -> Float[Tensor, "n K V3"]:
    """Sums over patches of the gradients of query, key and value, side by side.

    Only patches have a gradient as queries. Rows of the attention sum to one, so the sum over patch keys is
    minus the class token's column.
    """
    trace = shared.trace
    attention = trace.attention[:, :, 1:]
    grads = linear(back, block.out_weight.T).reshape(*back.shape[:3], block.heads, -1).permute(0, 3, 2, 1, 4)
    radial = (grads * trace.mixed[:, :, 1:, None]).sum(-1, keepdim=True)
    received = attention.mT @ torch.cat([grads, radial], -1).flatten(3)
    received = received.reshape(*received.shape[:3], back.shape[1], -1)
    columns = (received[..., :-1] * trace.value[:, :, :, None]).sum(-1) - received[..., -1]
    towards = attention[..., :1] * ((grads * trace.value[:, :, :1, None]).sum(-1) - radial[..., 0])
    scale = trace.query.shape[-1] ** -0.5
    query = scale * (columns.mT @ trace.key)
    key = -scale * (towards.mT @ trace.query[:, :, 1:])
    value = torch.einsum("ngp,ngpkd->ngkd", 1 - attention[..., 0], grads)
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (query, key, value)], dim=-1)

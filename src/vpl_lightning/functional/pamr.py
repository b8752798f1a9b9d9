"""Pixel-adaptive mask refinement (PAMR), a dense CRF's stand-in made of a few tensor operations.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.3. A pixel
takes over the scores of neighbours that look like it, again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.errors import ConfigurationError, DataError

DILATIONS_PX = (1, 2, 4, 8, 12, 24)
"""Distances of the neighbours in pixels, eight neighbours at each (Araslanov and Roth; ToCo, WeCLIP)."""
ITERATIONS = 10
"""Rounds (Araslanov and Roth)."""
SHARPNESS = 0.1
"""Width of the colour kernel in standard deviations of the neighbourhood.

The paper divides by the variance; its released code divides by 0.1 standard deviations, which is what we do.
"""
_EPSILON = 1e-8
_DIRECTIONS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def pamr(
    image: UInt8[Tensor, "H W 3"],
    scores: Float[Tensor, "K+1 H W"],
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS_PX,
    sharpness: float = SHARPNESS,
) -> Float[Tensor, "K+1 H W"]:
    """Average the scores over similar neighbours, beyond the border over the border's pixels.

    Weights are a softmax over all neighbours of minus the channels' mean of ``|difference| / (sharpness *
    deviation)``. The deviation is taken over neighbours and the pixel itself, counted once (the released code
    counts it once a dilation). Memory is one weight a neighbour and pixel; scores are shifted one neighbour
    at a time, so classes cost nothing more than their own scores.

    Args:
        image: As decoded, on any device.
        scores: Background first, only the classes that are present, on the same device.
        iterations: Rounds.
        dilations: Distances of the neighbours in pixels.
        sharpness: Smaller follows edges more closely.

    Returns:
        Refined scores; their sum over the classes is smoothed like they are, so one stays one.

    Raises:
        DataError: If image and scores differ in size.
        ConfigurationError: If a setting means nothing.
    """
    if image.shape[:2] != scores.shape[1:]:
        raise DataError(
            f"the image is {tuple(image.shape[:2])} pixels but its scores {tuple(scores.shape[1:])}"
        )
    if iterations < 1 or not sharpness > 0 or not dilations or min(dilations) < 1:
        raise ConfigurationError(
            f"pamr needs iterations >= 1, sharpness > 0 and dilations >= 1, "
            f"got {iterations}, {sharpness}, {dilations}"
        )
    weights = _affinity(image.movedim(-1, 0).float() / 255, dilations, sharpness)
    scores = scores.float()
    for _ in range(iterations):
        refined = torch.zeros_like(scores)
        for weight, shifted in zip(weights, _neighbours(scores, dilations), strict=True):
            refined.addcmul_(weight, shifted)
        scores = refined
    return scores


def _affinity(
    colours: Float[Tensor, "3 H W"], dilations: Sequence[int], sharpness: float
) -> Float[Tensor, "n H W"]:
    """Weights of all ``n = 8 * len(dilations)`` neighbours of each pixel; they sum to one."""
    count = len(_DIRECTIONS) * len(dilations) + 1
    mean, square = torch.zeros_like(colours), torch.zeros_like(colours)
    for shifted in _neighbours(colours, dilations):
        difference = shifted - colours
        mean += difference / count
        square.addcmul_(difference, difference, value=1 / count)
    width = (square - mean.square()).clamp_min_(0).sqrt_().mul_(sharpness).add_(_EPSILON)
    logits = colours.new_empty(count - 1, *colours.shape[1:])
    for index, shifted in enumerate(_neighbours(colours, dilations)):
        logits[index] = -((shifted - colours).abs_() / width).mean(0)
    return logits.softmax(0)


def _neighbours(values: Float[Tensor, "c H W"], dilations: Sequence[int]) -> Iterator[Float[Tensor, "c H W"]]:
    """Yield the values of one neighbour after the other, as views of one padded copy a dilation."""
    height, width = values.shape[1:]
    for distance in dilations:
        padded = F.pad(values[None], (distance,) * 4, mode="replicate")[0]
        for y, x in _DIRECTIONS:
            top, left = distance * (1 + y), distance * (1 + x)
            yield padded[:, top : top + height, left : left + width]

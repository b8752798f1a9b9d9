"""Position embeddings for other patch grids than the one a CLIP was trained on."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def resize_positions(
    positions: Float[Tensor, "S V"],
    native: tuple[int, int],
    grid: tuple[int, int],
    *,
    half: bool = True,
) -> Float[Tensor, "T V"]:
    """Resize a position embedding to a patch grid as CLIP-ES's ``upsample_pos_emb`` does.

    The row of the class token stays; the rows of the patches are resampled bilinearly with half-pixel centres
    and without antialiasing (open_clip would resample bicubically with it).

    Args:
        positions: Class token first.
        native: ``(h, w)`` of the embedding.
        grid: ``(h, w)`` of the image.
        half: Round the result through float16, as CLIP-ES does on every device.

    Returns:
        ``positions`` itself, neither resampled nor rounded, when the grids are equal: the encoder then equals
        a plain CLIP. CLIP-ES rounds there too, which changes nothing in OpenAI's weights, since they are
        stored in float16.
    """
    if grid == native:
        return positions
    patches = positions[1:].T.reshape(1, -1, *native)
    patches = F.interpolate(patches.float(), grid, mode="bilinear", align_corners=False)
    resized = torch.cat([positions[:1].float(), patches[0].flatten(1).T])
    return (resized.half() if half else resized).to(positions.dtype)

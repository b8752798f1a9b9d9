"""What an encoder must know of a vision tower, read from the model object and checked."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.vit import Activation, block_weights

PARTS = ("conv1", "class_embedding", "positional_embedding", "transformer", "ln_post", "proj")
"""Attributes of ``model.visual`` that OpenAI's, CLIP-ES's and open_clip's vision transformers share."""


class Geometry(NamedTuple):
    """Sizes and conventions of a CLIP vision transformer."""

    patch_size: int
    """Pixels."""
    width: int
    joint_width: int
    depth: int
    heads: int
    activation: Activation
    native_grid: tuple[int, int]
    """``(h, w)`` of the position embedding."""
    mean_pooled: bool
    """Whether the plain image feature is the mean of the patch tokens instead of the class token."""


def read_geometry(
    model: Any, *, patch_size: int | None = None, heads: int | None = None, quick_gelu: bool | None = None
) -> Geometry:
    """Read the geometry of an open_clip or OpenAI-style CLIP object.

    Args:
        model: The CLIP.
        patch_size: Overrides the stem's.
        heads: Overrides the blocks'.
        quick_gelu: Overrides the blocks' activation.

    Raises:
        ConfigurationError: If the model is no CLIP, its tower no plain vision transformer, or a block has
            parts that the encoder's arithmetic does not know.
    """
    visual = getattr(model, "visual", None)
    missing = [part for part in PARTS if getattr(visual, part, None) is None]
    if visual is None or missing or not hasattr(visual.transformer, "resblocks"):
        lacks = ", ".join(f"visual.{part}" for part in missing) or "visual.transformer.resblocks"
        raise ConfigurationError(
            f"{type(model).__name__} has no {'visual' if visual is None else lacks}: "
            "the encoder needs a CLIP with a vision transformer, as OpenAI's ViT models and open_clip's are"
        )
    if getattr(visual, "attn_pool", None) is not None:
        raise ConfigurationError(
            "the vision tower pools by attention, which CLIP's does not: choose a plain ViT"
        )
    pool = getattr(visual, "pool_type", "tok")
    if pool not in ("tok", "avg") or (pool == "avg" and getattr(visual, "final_ln_after_pool", False)):
        raise ConfigurationError(
            f"the vision tower pools in an unknown way ({pool}): choose a plain CLIP ViT"
        )
    activation: Activation | None = None if quick_gelu is None else ("quick_gelu" if quick_gelu else "gelu")
    blocks = list(visual.transformer.resblocks)
    try:
        read = [block_weights(block, heads=heads, activation=activation) for block in blocks]
    except (AttributeError, ValueError) as error:
        raise ConfigurationError(f"the blocks of the vision tower are not CLIP's: {error}") from error
    if len(read) < 2:
        raise ConfigurationError(
            f"the vision tower has {len(read)} block(s); Grad-CAM at the last needs one before it"
        )
    return Geometry(
        patch_size=patch_size or _stem_patch_size(visual.conv1),
        width=int(visual.class_embedding.shape[-1]),
        joint_width=int(visual.proj.shape[1]),
        depth=len(read),
        heads=read[-1].heads,
        activation=read[-1].activation,
        native_grid=_native_grid(visual),
        mean_pooled=pool == "avg",
    )


def _stem_patch_size(stem: nn.Module) -> int:
    found = getattr(stem, "patch_size", None) or getattr(stem, "stride", None)
    sides = {int(side) for side in found} if isinstance(found, (tuple, list)) else {found}
    size = sides.pop()
    if sides or not isinstance(size, int):
        raise ConfigurationError(
            f"the stem {type(stem).__name__} has patch size {found!r}; it must be one number of pixels: "
            "give the encoder patch_size="
        )
    return size


def _native_grid(visual: Any) -> tuple[int, int]:
    patches = int(visual.positional_embedding.shape[0]) - 1
    side = math.isqrt(patches)
    grid = getattr(visual, "grid_size", None) or (side, side)
    if grid[0] * grid[1] != patches:
        raise ConfigurationError(f"the position embedding has {patches} patches, which is no grid of {grid}")
    return int(grid[0]), int(grid[1])

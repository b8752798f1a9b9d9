"""CLIP with a vision transformer as OpenAI lays it out: parameters under their names, and the text tower."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpl_lightning.functional import vit


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """Sizes of one transformer."""

    width: int
    heads: int
    layers: int
    hidden: int
    """Width inside the MLP."""


class QuickGELU(nn.Module):
    """OpenAI's activation."""

    def forward(self, x: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        """Apply it."""
        return vit.activate(x, "quick_gelu")


class CLIP(nn.Module):
    """The parameters of both towers, uninitialised where the default device is ``meta``.

    It takes the place of open_clip's class for files, since importing that brings torchvision and timm: a
    quarter of a gigabyte. :class:`CLIPEncoder` does the arithmetic of the vision tower.

    Args:
        vision: Of the vision tower; ``text`` likewise.
        text: Of the text tower.
        patch_size: Pixels.
        native_patches: Patches of the position embedding.
        context_length: Tokens of a text.
        vocabulary: Known tokens.
        joint_width: Of the joint image-text space.
        quick_gelu: The activation of both towers: QuickGELU or GELU.
    """

    def __init__(
        self,
        *,
        vision: TowerSize,
        text: TowerSize,
        patch_size: int,
        native_patches: int,
        context_length: int,
        vocabulary: int,
        joint_width: int,
        quick_gelu: bool,
    ) -> None:
        super().__init__()
        self.visual = _Vision(vision, patch_size, native_patches, joint_width, quick_gelu)
        self.context_length = context_length
        self.transformer = _Transformer(text, quick_gelu)
        self.token_embedding = nn.Embedding(vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, joint_width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_text(self, tokens: Int[Tensor, "texts context"]) -> Float[Tensor, "texts D"]:
        """Return text features, not normalised, pooled at the end token, which has the highest id."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = vit.forward_block(x, vit.block_weights(block), causal=True)
        last: Tensor = self.ln_final(x)[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return last @ self.text_projection


class _Vision(nn.Module):
    def __init__(
        self, size: TowerSize, patch_size: int, native_patches: int, joint_width: int, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, size.width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(size.width))
        self.positional_embedding = nn.Parameter(torch.empty(native_patches + 1, size.width))
        self.ln_pre = nn.LayerNorm(size.width)
        self.transformer = _Transformer(size, quick_gelu)
        self.ln_post = nn.LayerNorm(size.width)
        self.proj = nn.Parameter(torch.empty(size.width, joint_width))
        self.image_mean: tuple[float, ...] | None = None
        self.image_std: tuple[float, ...] | None = None


class _Transformer(nn.Module):
    def __init__(self, size: TowerSize, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(size, quick_gelu) for _ in range(size.layers))


class _Block(nn.Module):
    def __init__(self, size: TowerSize, quick_gelu: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(size.width, size.heads)
        self.ln_1 = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(size.width, size.hidden),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(size.hidden, size.width),
            )
        )
        self.ln_2 = nn.LayerNorm(size.width)

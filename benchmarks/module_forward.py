"""The vision tower run by torch's own modules, as CLIP-ES and most codes of its kind do."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.structures import EncodedImages


class ModuleEncoder(CLIPEncoder):
    """A CLIP whose blocks before the last are called as modules, each of which returns its attention."""

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> EncodedImages:
        """Do what the library's encoder does."""
        with torch.no_grad():
            tokens, grid = self._tower.embed(self._pixels(images))
            maps = []
            for block in self.model.visual.transformer.resblocks[:-1]:
                tokens, attention = run_module(block, tokens, attention=True)
                maps.append(attention)
            kept = torch.stack(maps[len(maps) + 1 - self.attention_blocks :]).sum(0)
        return EncodedImages(tokens, kept, self.attention_blocks, grid)

    def encode_image(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Run all blocks and keep no attention."""
        with torch.no_grad():
            tokens, _ = self._tower.embed(self._pixels(images))
            for block in self.model.visual.transformer.resblocks:
                tokens, _ = run_module(block, tokens, attention=False)
            return self.model.visual.ln_post(tokens[:, 0]) @ self.model.visual.proj


def run_module(
    block: Any, tokens: Float[Tensor, "B T V"], *, attention: bool
) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T T"] | None]:
    """Call a residual attention block's parts, with attention averaged over heads if it is wanted."""
    normed = block.ln_1(tokens)
    if not block.attn.batch_first:
        normed = normed.transpose(0, 1)
    mixed, averaged = block.attn(normed, normed, normed, need_weights=attention)
    tokens = tokens + (mixed if block.attn.batch_first else mixed.transpose(0, 1))
    return tokens + block.mlp(block.ln_2(tokens)), averaged

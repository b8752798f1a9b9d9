"""The frozen vision tower up to its last block, computed from the parameters of somebody's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vpl_lightning.clip.geometry import Geometry
from vpl_lightning.clip.positions import resize_positions
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional import vit

DenseKind = Literal["value", "final", "penultimate"]
"""Which patch features; see :meth:`CLIPEncoder.dense`."""

CACHED_GRIDS = 16
"""Position embeddings kept for the patch grids of recent images."""


class VisionTower:
    """Runs a vision transformer of known geometry; owns no parameters, only copies that save work.

    Args:
        visual: The tower, kept by reference and read at every call.
        geometry: Its sizes and conventions.
        dtype: Type of the matrix products before the last block.
        half_positions: See :func:`resize_positions`.
    """

    def __init__(self, visual: Any, geometry: Geometry, *, dtype: torch.dtype, half_positions: bool) -> None:
        """Keep the tower by reference."""
        self.visual = visual
        self.geometry = geometry
        self.dtype = dtype
        self.half_positions = half_positions
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._early: list[vit.BlockWeights] = []

    def forget(self) -> None:
        """Drop the copies: the parameters have moved or changed type."""
        self._positions.clear()
        self._early.clear()

    @property
    def last_block(self) -> vit.BlockWeights:
        """Weights of the last block, float32."""
        return vit.cast_block(self._read(self.geometry.depth - 1), torch.float32)

    @property
    def early_blocks(self) -> list[vit.BlockWeights]:
        """Weights of the other blocks, matrices in ``dtype``."""
        if not self._early:
            self._early = [
                vit.cast_block(self._read(index), self.dtype) for index in range(self.geometry.depth - 1)
            ]
        return self._early

    @property
    def head(self) -> vit.HeadWeights:
        """``ln_post`` and the projection, float32."""
        norm = vit.norm_weights(self.visual.ln_post)
        norm = vit.NormWeights(norm.weight.float(), norm.bias.float(), norm.eps)
        return vit.HeadWeights(norm, self.visual.proj.float())

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B T V"], tuple[int, int]]:
        """Return the tokens that enter the first block, and the patch grid.

        Raises:
            DataError: If a side is no patch multiple.
            ConfigurationError: If the stem makes another grid or width than the geometry says.
        """
        size, (height, width) = self.geometry.patch_size, pixels.shape[-2:]
        if height % size or width % size:
            raise DataError(
                f"an image of {height} x {width} px does not fit patches of {size} px: "
                "use CLIPEncoder.resize first"
            )
        grid = (height // size, width // size)
        patches = self.visual.conv1(pixels)
        if patches.shape[1:] != (self.geometry.width, *grid):
            raise ConfigurationError(
                f"the stem made {tuple(patches.shape[1:])} of an image of {height} x {width} px; at patch "
                f"size {size} and width {self.geometry.width} it must be {(self.geometry.width, *grid)}"
            )
        patches = patches.float().flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.float().expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self._positions_of(grid)
        return (self.visual.ln_pre(tokens) if hasattr(self.visual, "ln_pre") else tokens), grid

    def run(self, tokens: Float[Tensor, "B T V"]) -> Iterator[Float[Tensor, "B T V"]]:
        """Yield the tokens after each block but the last."""
        for block in self.early_blocks:
            tokens = vit.forward_block(tokens, block)
            yield tokens

    def run_with_attention(
        self, tokens: Float[Tensor, "B T V"], kept: int
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T T"]]:
        """Return the tokens before the last block and the attention of the ``kept`` blocks there.

        Attention is averaged over heads and summed over blocks.
        """
        attention = tokens.new_zeros(tokens.shape[0], tokens.shape[1], tokens.shape[1])
        blocks = self.early_blocks
        for index, block in enumerate(blocks):
            if index < len(blocks) - kept:
                tokens = vit.forward_block(tokens, block)
            else:
                tokens, averaged = vit.forward_block_with_attention(tokens, block)
                attention += averaged
        return tokens, attention

    def trace(self, tokens: Float[Tensor, "B T V"]) -> vit.BlockTrace:
        """Run the last block in float32 and keep its intermediate values."""
        return vit.trace_block(tokens.float(), self.last_block)

    def dense(
        self, tokens: Float[Tensor, "B T V"], kind: DenseKind, trace: vit.BlockTrace | None
    ) -> Float[Tensor, "B P D"]:
        """Return unit patch features of the tokens that enter the last block.

        Raises:
            ConfigurationError: If the kind is unknown.
        """
        if kind == "penultimate":
            return vit.dense_features(tokens.float(), self.head)
        trace = trace or self.trace(tokens)
        if kind == "value":
            return vit.dense_features(vit.value_path(trace, self.last_block), self.head)
        if kind == "final":
            return vit.dense_features(trace.outputs, self.head)
        raise ConfigurationError(f"dense features of kind {kind!r}; choose value, final or penultimate")

    def pool_patches(self, outputs: Float[Tensor, "B T V"]) -> Float[Tensor, "B D"]:
        """Project the mean of the patch tokens after ``ln_post``."""
        return vit.layer_norm(outputs, self.head.norm)[:, 1:].mean(1) @ self.head.projection

    def encode_image(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Run every block, then pool as the model itself does."""
        outputs, _ = self.embed(pixels)
        for block in (*self.early_blocks, self.last_block):
            outputs = vit.forward_block(outputs, block)
        if self.geometry.mean_pooled:
            return self.pool_patches(outputs)
        return vit.layer_norm(outputs[:, 0], self.head.norm) @ self.head.projection

    def _read(self, index: int) -> vit.BlockWeights:
        block = self.visual.transformer.resblocks[index]
        return vit.block_weights(block, heads=self.geometry.heads, activation=self.geometry.activation)

    def _positions_of(self, grid: tuple[int, int]) -> Tensor:
        if grid not in self._positions:
            if len(self._positions) >= CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            table = self.visual.positional_embedding.detach().float()
            native = self.geometry.native_grid
            self._positions[grid] = resize_positions(table, native, grid, half=self.half_positions)
        return self._positions[grid]

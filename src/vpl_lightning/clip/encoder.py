"""A frozen CLIP that gives dense features, attention and a differentiable last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vpl_lightning.clip import preprocess, text, weights
from vpl_lightning.clip.class_sets import ClassSet
from vpl_lightning.clip.geometry import read_geometry
from vpl_lightning.clip.tower import DenseKind as DenseKind
from vpl_lightning.clip.tower import VisionTower
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional import vit
from vpl_lightning.structures import EncodedImages, ImageArray

Precision = Literal["float32", "bfloat16", "float16"]
Images = UInt8[np.ndarray, "B H W 3"] | UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_BLOCKS = 8
"""Last blocks whose attention CLIP-ES's affinity averages, of twelve."""


class CLIPEncoder(nn.Module):
    """Wraps a CLIP with a vision transformer; reads its parameters and does the arithmetic itself.

    Takes the model over: its parameters become float32 and frozen, and it stays in eval mode. At the native
    size the pooled output equals the model's own; for other sizes the position embedding is resized as
    CLIP-ES does.

    Args:
        model: An open_clip or OpenAI-style CLIP object (CLIP-ES's fork included). Its stem ``visual.conv1``
            may be any module that maps ``(B, 3, H, W)`` to ``(B, V, h, w)``.
        patch_size: Pixels a patch; read from the stem's ``patch_size`` or ``stride`` unless given.
        heads: Attention heads; read from the blocks unless given.
        quick_gelu: Whether the vision blocks use QuickGELU; read from the blocks unless given.
        attention_blocks: Last blocks whose attention the affinity averages (CLIP-ES: 8); at most the depth.
        precision: Arithmetic of the matrix products before the last block. Residual stream, norms, softmax of
            kept attention, last block, pooled feature and text tower are float32: CLIP-ES's fp16 gradients
            underflow.
        tokenizer: Texts to token ids; open_clip's byte-pair tokenizer unless given.
        half_positions: Round a resized position embedding through float16, as CLIP-ES does.

    Attributes:
        patch_size: Pixels a patch.
        width: V, width of the vision transformer.
        joint_width: D, width of the joint image-text space.
        depth: Blocks of the vision transformer.
        mean: Of the RGB channels in [0, 1], as the model was trained; ``std`` likewise.

    Raises:
        ConfigurationError: If the model is no CLIP with a plain vision transformer, or a setting is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        patch_size: int | None = None,
        heads: int | None = None,
        quick_gelu: bool | None = None,
        attention_blocks: int = ATTENTION_BLOCKS,
        precision: Precision = "float32",
        tokenizer: text.Tokenizer | None = None,
        half_positions: bool = True,
    ) -> None:
        """Check the model, then freeze it."""
        super().__init__()
        if precision not in DTYPES:
            raise ConfigurationError(f"precision is {precision!r}; choose one of {', '.join(DTYPES)}")
        if attention_blocks < 1:
            raise ConfigurationError(f"attention_blocks is {attention_blocks}; it must be at least 1")
        geometry = read_geometry(model, patch_size=patch_size, heads=heads, quick_gelu=quick_gelu)
        self.geometry = geometry
        self.patch_size = geometry.patch_size
        self.width = geometry.width
        self.joint_width = geometry.joint_width
        self.depth = geometry.depth
        self.model: Any = model.float().requires_grad_(False).eval()
        self.attention_blocks = min(attention_blocks, geometry.depth)
        self.precision: Precision = precision
        self.half_positions = half_positions
        self.tokenizer = tokenizer
        self.mean, self.std = preprocess.pixel_statistics(self.model.visual)
        self._tower = VisionTower(
            self.model.visual, geometry, dtype=DTYPES[precision], half_positions=half_positions
        )
        self._fingerprint = ""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        quick_gelu: bool | None = None,
        heads: int | None = None,
        text_heads: int | None = None,
        **options: Any,
    ) -> CLIPEncoder:
        """Load a local file: OpenAI's TorchScript archive, a state dict, or safetensors.

        Args:
            path: The file. Geometry is inferred from its tensors.
            quick_gelu: The activation, where the file does not tell.
            heads: Heads of the vision blocks; width / 64 (OpenAI's rule) unless the file tells.
            text_heads: The same of the text blocks.
            options: Further arguments of the constructor.

        Raises:
            WeightsError: If the file is missing, unreadable, no CLIP with a vision transformer, or silent or
                contradicted about its activation.
        """
        loaded = weights.load_checkpoint(path, quick_gelu=quick_gelu, heads=heads, text_heads=text_heads)
        return cls(loaded, **options)

    @classmethod
    def from_open_clip(cls, name: str, pretrained: str | None = None, **options: Any) -> CLIPEncoder:
        """Build one of open_clip's models.

        Args:
            name: Such as ``ViT-B-16-quickgelu``.
            pretrained: A tag such as ``openai``, which open_clip downloads, or a local file. None leaves the
                weights random, with a warning.
            options: Further arguments of the constructor.

        Raises:
            WeightsError: If the name or tag is unknown, the tag was trained with another activation than the
                name builds (``ViT-B-16`` with ``openai``), or the weights cannot be had.
        """
        model, tokenizer = weights.load_open_clip(name, pretrained)
        return cls(model, **{"tokenizer": tokenizer, **options})

    @classmethod
    def embedded(cls, **options: Any) -> CLIPEncoder:
        """Load the tiny CLIP of drawn scenes that the package carries; ``options`` as the constructor's."""
        return cls.from_checkpoint(weights.EMBEDDED, **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.visual.class_embedding.device
        return device

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines in CLIP's softmax, about 100."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def last_block(self) -> vit.BlockWeights:
        """Weights of the last block, float32."""
        return self._tower.last_block

    @property
    def head(self) -> vit.HeadWeights:
        """``ln_post`` and the projection, float32."""
        return self._tower.head

    def train(self, mode: bool = True) -> CLIPEncoder:
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Return a hash of weights, geometry and every setting that changes what the encoder computes.

        The same for the same weights from whatever container, on whatever device.
        """
        if not self._fingerprint:
            settings = (self.geometry, self.attention_blocks, self.precision, self.half_positions)
            self._fingerprint = weights.fingerprint(
                self.model.state_dict(), repr((*settings, self.mean, self.std))
            )
        return self._fingerprint

    def resize(self, image: ImageArray) -> preprocess.ResizedArray:
        """Resize a decoded image to the next patch multiple; see :func:`resize_to_patches`."""
        return preprocess.resize_to_patches(image, self.patch_size)

    def normalise(
        self, images: UInt8[np.ndarray, "B H W 3"] | UInt8[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """Scale bytes to [0, 1], then by the encoder's own mean and standard deviation, on its device."""
        return preprocess.normalise_pixels(images, self.mean, self.std, self.device)

    def encode(self, images: Images) -> EncodedImages:
        """Run every block but the last.

        Args:
            images: uint8, or floats that are normalised already; each side a patch multiple (:meth:`resize`).

        Returns:
            Float32 tokens, and the sum of the head-averaged attention of the ``attention_blocks - 1`` blocks
            before the last; its rows sum to ``attention_blocks - 1``.

        Raises:
            DataError: If a side is no patch multiple.
        """
        with self._frozen_arithmetic():
            tokens, grid = self._tower.embed(self._pixels(images))
            tokens, attention = self._tower.run_with_attention(tokens, self.attention_blocks - 1)
        return EncodedImages(tokens, attention, self.attention_blocks, grid)

    def hidden(self, images: Images) -> list[Float[Tensor, "B V h w"]]:
        """Return the float32 patch tokens after each block but the last, first block first."""
        with self._frozen_arithmetic():
            tokens, grid = self._tower.embed(self._pixels(images))
            outputs = self._tower.run(tokens)
            return [out[:, 1:].transpose(1, 2).reshape(len(out), -1, *grid) for out in outputs]

    def trace(self, tokens: Float[Tensor, "B T V"]) -> vit.BlockTrace:
        """Run the last block in float32 and keep its intermediate values; differentiable in ``tokens``."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._tower.trace(tokens)

    def dense(
        self,
        encoded: EncodedImages | Float[Tensor, "B T V"],
        kind: DenseKind,
        trace: vit.BlockTrace | None = None,
    ) -> Float[Tensor, "B P D"]:
        """Return patch features in the joint space.

        Args:
            encoded: The result of :meth:`encode`, or its tokens.
            kind: ``value``: the last block's value path alone (MaskCLIP), the part that Grad-CAM at ``ln_1``
                sees; ``final``: its output tokens; ``penultimate``: the tokens that enter it. Each through
                ``ln_post`` and the projection.
            trace: :meth:`trace` of the same tokens, if at hand.

        Returns:
            Unit rows.

        Raises:
            ConfigurationError: If the kind is unknown.
        """
        tokens = encoded.tokens if isinstance(encoded, EncodedImages) else encoded
        with self._frozen_arithmetic():
            return self._tower.dense(tokens, kind, trace)

    def pooled(self, outputs: Float[Tensor, "B T V"]) -> Float[Tensor, "B D"]:
        """Pool the tokens after the last block as CLIP-ES does.

        Mean of the patch tokens after ``ln_post``, projected; differentiable, not normalised.
        """
        return self._tower.pool_patches(outputs)

    def encode_image(self, images: Images) -> Float[Tensor, "B D"]:
        """Return CLIP's own image feature (the class token's for OpenAI's models), not normalised.

        Args:
            images: As :meth:`encode` takes them.
        """
        with self._frozen_arithmetic():
            return self._tower.encode_image(self._pixels(images))

    def encode_text(self, texts: str | Sequence[str]) -> Float[Tensor, "texts D"]:
        """Return unit rows of a text or texts, by the model's own text tower.

        Raises:
            ConfigurationError: If a text has more tokens than the model reads, or the tower was dropped.
        """
        if self.tokenizer is None:
            self.tokenizer = text.default_tokenizer(self.model)
        with self._frozen_arithmetic():
            return text.embed_texts(self.model, texts, self.tokenizer, self.device)

    def encode_classes(self, classes: ClassSet) -> Float[Tensor, "C D"]:
        """Return the text prototypes of a class set: foreground rows, then background; templates averaged."""
        rows = self.encode_text(text.fill_templates(classes))
        return text.average_templates(rows, len(classes.templates))

    def drop_text(self) -> None:
        """Free the text tower for good, a quarter of a gigabyte of a ViT-B/16; the fingerprint stays."""
        self.fingerprint()
        text.drop_tower(self.model)
        self.tokenizer = text.refuse

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CLIPEncoder:
        self._tower.forget()
        applied: CLIPEncoder = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _pixels(self, images: Images) -> Tensor:
        if isinstance(images, np.ndarray) or images.dtype == torch.uint8:
            return self.normalise(images)
        return images.to(self.device).float()

    @contextmanager
    def _frozen_arithmetic(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

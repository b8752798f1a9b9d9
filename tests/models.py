"""Tiny CLIP models with random weights, built by open_clip, for every test."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg


def tiny_clip(
    *,
    width: int = 64,
    layers: int = 4,
    heads: int = 2,
    patch_size: int = 8,
    image_size: int = 32,
    joint_width: int = 32,
    quick_gelu: bool = True,
    context_length: int = 77,
    vocab_size: int = 49408,
    seed: int = 0,
    **vision: Any,
) -> CLIP:
    """Return an open_clip CLIP with reproducible random weights, in eval mode and float32.

    Every parameter is random, biases and norms included, so that no term of a formula can hide behind a zero
    or a one. The text tower has width 64, one head and two blocks; the tokenizer is open_clip's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=joint_width,
            vision_cfg=CLIPVisionCfg(
                layers=layers,
                width=width,
                head_width=width // heads,
                patch_size=patch_size,
                image_size=image_size,
                **vision,
            ),
            text_cfg=CLIPTextCfg(
                context_length=context_length, vocab_size=vocab_size, width=64, heads=1, layers=2
            ),
            quick_gelu=quick_gelu,
            init_logit_scale=4.6052,
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("bias",)) or ".ln_" in name or name.startswith("ln_"):
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif "in_proj_weight" in name:
                parameter.data.mul_(2)
    return model.eval()

"""The rival of the timings computes what the library computes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP

from vpl_lightning.clip import CLIPEncoder

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_equals_the_library(tiny_clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = importlib.import_module("module_forward").ModuleEncoder(tiny_clip, attention_blocks=3)
    ours = CLIPEncoder(tiny_clip, attention_blocks=3)
    pixels = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    found, expected = modules.encode(pixels), ours.encode(pixels)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.attention, expected.attention, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(modules.encode_image(pixels), ours.encode_image(pixels), rtol=1e-4, atol=1e-5)

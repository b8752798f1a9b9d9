"""Fixtures that several parts share."""

from __future__ import annotations

import os

# Before torch is loaded: two workers on two cores must not wait for their threads by spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from open_clip.model import CLIP

from tests.models import tiny_clip
from vpl_lightning.clip import CLIPEncoder

# LightningCLI calls what jsonargparse is about to rename; that is between the two.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(name="tiny_clip", scope="session")
def tiny_clip_fixture() -> CLIP:
    """A random four-block CLIP: patch 8, native image 32 px, width 64, joint width 32, QuickGELU."""
    return tiny_clip()


@pytest.fixture(scope="session")
def tiny_encoder() -> CLIPEncoder:
    """The frozen encoder around a model of its own, equal to ``tiny_clip``."""
    return CLIPEncoder(tiny_clip())

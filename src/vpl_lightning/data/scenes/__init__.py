"""Procedurally drawn scenes of everyday things with exact masks and captions."""

from vpl_lightning.data.scenes.captions import describe
from vpl_lightning.data.scenes.compose import BACKGROUNDS, CLASSES, HOMES, Scene, render_scene

__all__ = ["BACKGROUNDS", "CLASSES", "HOMES", "Scene", "describe", "render_scene"]

"""Semantic segmentation from image-level tags with a frozen CLIP and learnt vision prototypes."""

from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.plugin import VPLPlugin
from vpl_lightning.registry import baselines

__all__ = ["BaselineInfo", "CAMGenerator", "VPLPlugin", "__version__", "baselines"]

__version__ = "0.1.0"

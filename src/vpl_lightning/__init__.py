"""Semantic segmentation from image-level tags with a frozen CLIP and learnt vision prototypes.

Public names are imported when they are first used: the processes that only refine masks never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpl_lightning.cams import BaselineInfo, CAMGenerator
    from vpl_lightning.plugin import VPLPlugin
    from vpl_lightning.registry import baselines

__all__ = ["BaselineInfo", "CAMGenerator", "VPLPlugin", "__version__", "baselines"]

__version__ = "0.1.0"

_HOMES = {
    "BaselineInfo": "vpl_lightning.cams",
    "CAMGenerator": "vpl_lightning.cams",
    "VPLPlugin": "vpl_lightning.plugin",
    "baselines": "vpl_lightning.registry",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)

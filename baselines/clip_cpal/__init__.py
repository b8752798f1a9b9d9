"""Context prototypes on CLIP-ES."""

from vpl_baselines.clip_cpal.adapter import ClipCPAL

__all__ = ["ClipCPAL"]

"""CLIP-ES: class activation maps of a frozen CLIP, refined along its own attention."""

from vpl_baselines.clip_es.adapter import ClipES

__all__ = ["ClipES"]

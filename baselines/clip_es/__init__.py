"""CLIP-ES."""

from vpl_baselines.clip_es.adapter import ClipES

__all__ = ["ClipES"]

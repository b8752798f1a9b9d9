"""Somebody else's checkout, run as it is."""

from vpl_baselines.external.adapter import External

__all__ = ["External"]

"""Errors of the library. Every message says what was found and what to do about it."""

from __future__ import annotations


class VPLError(Exception):
    """Base of every error that vpl_lightning raises on purpose."""


class ConfigurationError(VPLError, ValueError):
    """A wrong setting: names the key, the value and the fix. The command line ends with exit code 2."""


class DataError(VPLError, RuntimeError):
    """A file, label or mask that is missing, unreadable or inconsistent: names it. Exit code 1."""


class WeightsError(VPLError, RuntimeError):
    """A checkpoint that cannot be read as the CLIP model it should be. Exit code 2 on the command line."""


class PluginError(VPLError, RuntimeError):
    """A registered CAM generator that cannot be loaded or that breaks the generator contract."""

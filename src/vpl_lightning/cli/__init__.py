"""The ``vpl`` command."""

from vpl_lightning.cli.main import main

__all__ = ["main"]

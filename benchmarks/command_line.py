"""The command that made a table, as its reader would type it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def command(arguments: Sequence[str]) -> str:
    """Return the command line, absolute paths cut to their last part."""
    script, *rest = arguments
    named = [Path(one).name if Path(one).is_absolute() else one for one in rest]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *named])

"""``vpl baselines``: which CAM generators are registered, and which of them cannot be used."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterable, Sequence

from vpl_lightning.errors import PluginError
from vpl_lightning.registry import Registry, baselines

HEADINGS = ("name", "paper", "origin", "licence")


def list_baselines(json: bool = False) -> int:
    """Print the registered CAM generators: name, paper, origin, licence.

    A plug-in that cannot be used is named with the reason on standard error and left out of the table.

    Args:
        json: Print a JSON list instead of a table; unusable plug-ins appear in it with their ``error``.
    """
    usable, broken = survey(baselines)
    if json:
        print(json_format.dumps([*usable, *broken], indent=1, ensure_ascii=False))
    else:
        print(table(HEADINGS, [[row[key] for key in HEADINGS] for row in usable]))
    for row in broken:
        print(f"vpl: warning: skipped '{row['name']}': {row['error']}", file=sys.stderr)
    return 0


def survey(registry: Registry) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Import every registered generator, one failure not touching the others.

    Returns:
        Rows of ``name, paper, origin, licence, module`` of the usable ones; ``name, error`` of the others.
    """
    usable, broken = [], []
    for name in registry:
        try:
            info = registry.get(name).info
        except PluginError as error:
            broken.append({"name": name, "error": str(error)})
            continue
        about = {"paper": info.paper, "origin": info.origin, "licence": info.licence}
        usable.append({"name": name, **about, "module": registry.origin(name)})
    return usable, broken


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out text in columns as wide as their longest entry, a rule below the headings."""
    cells = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

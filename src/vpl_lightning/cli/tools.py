"""Subcommands that need no trainer: ``prepare``, ``evaluate``, ``baselines``."""

from __future__ import annotations

from typing import Any

from jsonargparse import auto_cli

from vpl_lightning.cli.baselines import list_baselines
from vpl_lightning.cli.evaluate import evaluate
from vpl_lightning.cli.prepare import prepare_coco, prepare_folder, prepare_voc

FLAGS = ("--verify", "--json")
"""Options that may be given without a value."""


def run_tool(words: list[str]) -> int:
    """Parse and run one of the tools; jsonargparse ends wrong use with exit code 2."""
    components: Any = {
        "prepare": {"voc": prepare_voc, "coco": prepare_coco, "folder": prepare_folder},
        "evaluate": evaluate,
        "baselines": list_baselines,
    }
    return int(auto_cli(components, args=spell_flags(words), as_positional=True) or 0)


def spell_flags(words: list[str]) -> list[str]:
    """Give flags their value: ``--verify`` alone means ``--verify true``."""
    return [
        f"{word}=true" if word in FLAGS and following not in ("true", "false") else word
        for word, following in zip(words, [*words[1:], ""], strict=True)
    ]

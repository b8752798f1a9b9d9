"""Subcommands that need no trainer: ``prepare``, ``evaluate``, ``baselines``."""

from __future__ import annotations

from jsonargparse import auto_cli

from vpl_lightning.cli.baselines import list_baselines
from vpl_lightning.cli.evaluate import evaluate
from vpl_lightning.cli.prepare import prepare_coco, prepare_folder, prepare_voc


def run_tool(words: list[str]) -> int:
    """Parse and run one of the tools; jsonargparse ends wrong use with exit code 2."""
    components = {
        "prepare": {"voc": prepare_voc, "coco": prepare_coco, "folder": prepare_folder},
        "evaluate": evaluate,
        "baselines": list_baselines,
    }
    return int(auto_cli(components, args=words, as_positional=True) or 0)

"""Dispatch of ``vpl``: Lightning's subcommands, and those that need no trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vpl_lightning.errors import ConfigurationError, VPLError, WeightsError

TRAINER_COMMANDS = {
    "fit": "the whole method, or phase 1 alone, as the configuration says",
    "validate": "mIoU on the validation split",
    "test": "mIoU with the full protocol: scales, flip, CRF",
    "predict": "palette PNG masks for a file, a folder or a split",
}
TOOL_COMMANDS = {
    "prepare": "build masks, labels and lists from the official archives or a folder, and check every file",
    "evaluate": "mIoU of a folder of masks or maps against the truth",
    "baselines": "the registered CAM generators",
}
WRONG_USE, FAILED = 2, 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; those of the process if None.

    Returns:
        0 if the work was done, 1 if it failed, 2 if the command or the configuration is wrong.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else WRONG_USE
    if words[0] == "--version":
        from vpl_lightning import __version__

        print(f"vpl_lightning {__version__}")
        return 0
    if words[0] not in {**TRAINER_COMMANDS, **TOOL_COMMANDS}:
        return _complain(
            f"unknown command '{words[0]}'; choose from {', '.join({**TRAINER_COMMANDS, **TOOL_COMMANDS})}",
            WRONG_USE,
        )
    try:
        return _run(words, given=args is not None)
    except (ConfigurationError, WeightsError) as error:
        return _complain(reason(error), WRONG_USE)
    except VPLError as error:
        return _complain(reason(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on where this run stopped", FAILED)


def _run(words: list[str], *, given: bool) -> int:
    from vpl_lightning.cli.process import tune

    tune()
    if words[0] in TRAINER_COMMANDS:
        sys.path.append(str(Path.cwd()))  # classes and factories that a configuration names may lie here
        from vpl_lightning.cli.lightning import run_trainer

        run_trainer(words if given else None)
        return 0
    from vpl_lightning.cli.tools import run_tool

    return run_tool(words)


def reason(error: VPLError) -> str:
    """Return an error's message, without the traceback that torch adds to one from a loader's worker."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def _complain(message: str, code: int) -> int:
    print(f"vpl: error: {message}", file=sys.stderr)
    return code


def _usage() -> str:
    rows = [f"  {name:<10} {text}" for name, text in {**TRAINER_COMMANDS, **TOOL_COMMANDS}.items()]
    return "\n".join(
        [
            "usage: vpl [-h] [--version] COMMAND ...",
            "",
            "Semantic segmentation from image-level tags with a frozen CLIP and learnt vision prototypes.",
            "",
            "commands:",
            *rows,
            "",
            "'vpl COMMAND --help' lists the options of a command.",
            "'vpl fit --config configs/shapes.yaml' needs no download.",
        ]
    )

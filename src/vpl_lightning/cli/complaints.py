"""Parser errors in one line: the key, the value and what is wrong, without the types that were tried on the way."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

FRAME = ("Does not validate against any", "Subtypes:", "Errors:", "Given value type:", "Given value:")
"""Beginnings of lines that only say how jsonargparse searched."""
TYPE = "Expected a "
"""Beginning of lines that name a type which did not fit."""
LONGEST = 400
"""Characters of a line that are shown."""


class BriefParser(LightningArgumentParser):
    """Ends wrong use with exit code 2 and one line, not with the usage of every trainer option."""

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Parse words; an inner parser gets null back as jsonargparse's ``str()`` of a value has not spelt it."""
        if args is not None and not self.exit_on_error:
            args = [restore_null(word) for word in args]
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit; an inner parser leaves that to the outer one, which knows the key."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"vpl: error: {distil(message)}", file=sys.stderr)
        raise SystemExit(2)


def restore_null(word: str) -> str:
    """Spell a value of Python, where it is or holds None, as the YAML that it came from.

    jsonargparse hands ``--encoder.checkpoint=null`` on as ``--checkpoint=None``, which YAML takes for a file name.

    Args:
        word: An option with its value, ``--key=value``.
    """
    option, equals, text = word.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return word
    return f"{option}{equals}{json.dumps(value)}" if value is None or isinstance(value, dict | list) else word


def distil(message: str) -> str:
    """Reduce jsonargparse's nested report to keys and reasons.

    Args:
        message: The report; one that has no frame is returned as it is.
    """
    keys: list[str] = []
    owner = ""
    details: list[str] = []
    types: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if found := re.match(r'Parser key "(.+?)":', text):
            keys.append(found[1])
            text = text[found.end() :].strip()
        if not text:
            continue
        if found := re.fullmatch(r"Problem with given class_path '(.+)':", text):
            owner = found[1]
        elif text.startswith(TYPE):
            types.append(text)
        elif not text.startswith(FRAME):
            details.append(text[:LONGEST])
    where = ".".join(keys)
    reasons = list(dict.fromkeys(details or types)) or [message]
    return (f"{where}: " if where else "") + "; ".join(
        reason + _suggestion(reason, owner) for reason in reasons
    )


def _suggestion(reason: str, owner: str) -> str:
    """Name the options that an unknown one may have meant."""
    found = re.search(r"Option '(.+?)' is not accepted", reason)
    if found is None or not owner:
        return ""
    module, _, name = owner.rpartition(".")
    known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    close = difflib.get_close_matches(found[1].rpartition(".")[2], known, n=2)
    return (
        f" by {name}; did you mean {' or '.join(close)}?"
        if close
        else f" by {name}; it takes {', '.join(known)}"
    )

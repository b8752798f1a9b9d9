"""What a product was made from: a fingerprint of its settings, and the manifest that lies beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import ConfigurationError, DataError

MANIFEST = "manifest.json"
"""Name of the file that says what a folder's products were made from."""
SHOWN_CHANGES = 3
"""How many changed settings an explanation spells out."""


def canonical(settings: Any) -> Any:
    """Return settings as plain JSON values: dataclasses become mappings, tuples lists, paths text.

    Raises:
        ConfigurationError: If a value has no canonical form (a set, an object, a number that is not finite).
    """
    return _plain(settings, "settings")


def fingerprint(settings: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``settings`` in hexadecimal, whatever the order of keys."""
    text = json.dumps(canonical(settings), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The settings behind a folder's products, as ``manifest.json`` beside them keeps them.

    The version of the code of a stage belongs into the settings like everything else.

    Attributes:
        settings: Canonical (see :func:`canonical`), nested at will.
        complete: Whether the stage said that nothing is missing any more.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def fingerprint(self) -> str:
        """The :func:`fingerprint` of the settings alone."""
        return fingerprint(self.settings)

    def write(self, folder: str | Path) -> None:
        """Write the manifest into ``folder``, whole or not at all."""
        content = {
            "fingerprint": self.fingerprint,
            "complete": self.complete,
            "settings": canonical(self.settings),
        }
        atomic_write(Path(folder) / MANIFEST, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def read(cls, folder: str | Path) -> Manifest | None:
        """Read the manifest of ``folder``; None if it has none.

        Raises:
            DataError: If the file is there but is no manifest.
        """
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text())
            return cls(dict(content["settings"]), complete=bool(content["complete"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a manifest ({error!r}): delete it to have the folder rebuilt"
            ) from error

    @classmethod
    def mark_complete(cls, folder: str | Path) -> None:
        """Note in the manifest of ``folder`` that nothing is missing; one process does, after all others.

        Raises:
            DataError: If there is no manifest.
        """
        found = cls.read(folder)
        if found is None:
            raise DataError(f"{Path(folder)} holds no {MANIFEST}, so nothing there can be complete")
        cls(found.settings, complete=True).write(folder)

    @classmethod
    def match_or_explain(
        cls, folder: str | Path, settings: Mapping[str, Any], *, complete: bool = False
    ) -> str | None:
        """Return None if the products in ``folder`` were made from ``settings``, else why not, as a clause.

        Args:
            folder: Where the products are, or would be.
            settings: What they should have been made from.
            complete: Also ask that the stage was finished.

        Returns:
            Such as ``"targets.mode changed from 'prod' to 'avg'"``, to be put behind "rebuilt because".
        """
        try:
            found = cls.read(folder)
        except DataError as error:
            return str(error)
        if found is None:
            return f"{Path(folder)} holds no {MANIFEST} yet"
        changes = _changes(found.settings, canonical(settings), "")
        if changes:
            more = len(changes) - SHOWN_CHANGES
            return ", ".join(changes[:SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
        return "an earlier run did not finish" if complete and not found.complete else None


def _plain(value: Any, key: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, (Enum, np.generic)):
        value = value.value if isinstance(value, Enum) else value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigurationError(
        f"{key}={value!r} cannot enter a fingerprint: use text, finite numbers, booleans, lists and mappings"
    )


def _changes(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*new, *(name for name in old if name not in new)]
        return [
            change
            for name in names
            for change in _changes(
                old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else str(name)
            )
        ]
    return (
        []
        if old == new and type(old) is type(new)
        else [f"{key} changed from {_shown(old)} to {_shown(new)}"]
    )


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _shown(value: Any, *, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."

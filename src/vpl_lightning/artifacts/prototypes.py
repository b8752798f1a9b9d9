"""Prototypes on disk: safetensors with a line of metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import DataError

_NAME = "prototypes"
_KEY = "vpl_lightning"
"""The one entry of metadata, JSON: safetensors writes several in an order that changes from run to run."""


class StoredPrototypes(NamedTuple):
    """Prototypes as read from a file."""

    prototypes: Float[Tensor, "C D"]
    """Float32, foreground rows, then background."""
    metadata: dict[str, str]
    """Whatever text was stored with them: class names, fingerprint, settings."""


def write_prototypes(
    path: str | Path, prototypes: Float[Tensor, "C D"], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write prototypes as float32 safetensors, whole or not at all."""
    from safetensors.torch import save

    tensors = {_NAME: prototypes.detach().float().cpu().contiguous()}
    about = json.dumps(dict(metadata or {}), sort_keys=True)
    atomic_write(path, save(tensors, metadata={_KEY: about}))


def read_prototypes(path: str | Path) -> StoredPrototypes:
    """Read prototypes that :func:`write_prototypes` wrote.

    Raises:
        DataError: If the file is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return StoredPrototypes(file.get_tensor(_NAME), json.loads(file.metadata()[_KEY]))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: not a file of prototypes ({error})") from error

"""Localisation maps on their own grid, a few kB an image, where CLIP-ES keeps them at image size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int64

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import DataError

_KEY = "vpl_lightning"
"""The one entry of metadata, JSON: safetensors writes several in an order that changes from run to run."""


class PatchMaps(NamedTuple):
    """What a file of maps holds, half precision."""

    classes: Int64[np.ndarray, " K"]
    """0-based foreground ids."""
    cams: Float16[np.ndarray, "K h w"]
    """Class activation maps on the patch grid."""
    affinity: Float16[np.ndarray, "K r s"]
    """Maps after class-aware attention affinity."""
    size: tuple[int, int]
    """``(H, W)`` of the image."""


def write_maps(
    path: str | Path,
    *,
    classes: Int64[np.ndarray, " K"],
    cams: Float[np.ndarray, "K h w"],
    affinity: Float[np.ndarray, "K r s"],
    size: tuple[int, int],
    fingerprint: str | None = None,
) -> None:
    """Write the maps of one image as safetensors, whole or not at all, rounded to half precision."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {
        "classes": np.ascontiguousarray(classes, np.int64),
        "cams": np.ascontiguousarray(cams, np.float16),
        "affinity": np.ascontiguousarray(affinity, np.float16),
    }
    about = {"size": list(size), "fingerprint": fingerprint}
    atomic_write(path, save(tensors, metadata={_KEY: json.dumps(about)}))


def read_maps(path: str | Path) -> PatchMaps:
    """Read the maps of one image.

    Raises:
        DataError: If the file is missing, damaged or something else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        height, width = _about(Path(path))["size"]
        return PatchMaps(tensors["classes"], tensors["cams"], tensors["affinity"], (height, width))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: not a file of localisation maps ({error!r})") from error


def maps_fingerprint(path: str | Path) -> str | None:
    """Return the fingerprint in a file of maps; None if there is no whole file or none in it."""
    try:
        found = _about(Path(path))["fingerprint"]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return None if found is None else str(found)


def _about(path: Path) -> dict[str, Any]:
    """Read the metadata of a safetensors file, whose tensors must end where the file ends."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("cut short")
        header: dict[str, Any] = json.loads(file.read(length))
    about: dict[str, Any] = json.loads(header.pop("__metadata__")[_KEY])
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise ValueError("cut short")
    return about

"""Files on disk, the only thing that the phases hand over to each other.

Every file is written beside its final name and moved there whole; none is read by running code that it
contains. Nothing here imports torch before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vpl_lightning.artifacts.atomic import atomic_path, atomic_write, remove_leftovers
from vpl_lightning.artifacts.clip_es import ClipESMaps, read_clip_es, write_clip_es
from vpl_lightning.artifacts.fingerprint import Manifest, canonical, fingerprint
from vpl_lightning.artifacts.maps import PatchMaps, maps_fingerprint, read_maps, write_maps
from vpl_lightning.artifacts.palette import mask_fingerprint, read_mask, voc_palette, write_mask

if TYPE_CHECKING:
    from vpl_lightning.artifacts.prototypes import StoredPrototypes, read_prototypes, write_prototypes

__all__ = [
    "ClipESMaps",
    "Manifest",
    "PatchMaps",
    "StoredPrototypes",
    "atomic_path",
    "atomic_write",
    "canonical",
    "fingerprint",
    "maps_fingerprint",
    "mask_fingerprint",
    "read_clip_es",
    "read_maps",
    "read_mask",
    "read_prototypes",
    "remove_leftovers",
    "voc_palette",
    "write_clip_es",
    "write_maps",
    "write_mask",
    "write_prototypes",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when somebody asks for it: the processes that make masks do not."""
    if name in ("StoredPrototypes", "read_prototypes", "write_prototypes"):
        from vpl_lightning.artifacts import prototypes

        return getattr(prototypes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Maps in CLIP-ES's own format: an ``.npy`` file an image with a pickled ``{"keys", "attn_highres"}``.

The released `generate_cams_voc12.py` writes them and the scripts after it read them. A pickle can run code,
so the reader here never resolves a name from the file: it knows the few that numpy writes for plain arrays,
replaces them by stand-ins of its own and refuses every other one.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int64

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import DataError

_PLAIN = re.compile(r"^[<>|=]?[biuf]\d{1,2}$")
_OBJECTS = re.compile(r"^\|?O8?$")


class ClipESMaps(NamedTuple):
    """The maps of one image."""

    keys: Int64[np.ndarray, " K"]
    """0-based foreground ids, in the order of the labels."""
    attn_highres: Float16[np.ndarray, "K H W"]
    """Refined maps at image size, in [0, 1]."""


def write_clip_es(
    path: str | Path, keys: Int64[np.ndarray, " K"], maps: Float[np.ndarray, "K H W"], **extra: np.ndarray
) -> None:
    """Write maps as CLIP-ES does, readable by its ``eval_cam.py`` and ``eval_cam_with_crf.py``.

    Args:
        path: ``<image id>.npy``.
        keys: 0-based foreground ids.
        maps: Refined maps at image size; stored in half precision.
        extra: Further arrays of the dictionary, such as ``highres``.
    """
    content = {"keys": np.asarray(keys, np.int64), "attn_highres": np.asarray(maps, np.float16), **extra}
    buffer = io.BytesIO()
    np.save(buffer, np.array(content, dtype=object))
    atomic_write(path, buffer.getvalue())


def read_clip_es(path: str | Path, *, field: str = "attn_highres") -> ClipESMaps:
    """Read maps that CLIP-ES wrote, without running anything that the file may contain.

    Args:
        path: The ``.npy`` file.
        field: Which maps of the dictionary; CLIP-ES can also write ``highres``, the unrefined ones.

    Raises:
        DataError: If the file is missing or damaged, asks for anything but plain arrays, or holds others.
    """
    try:
        with Path(path).open("rb") as file:
            content = _load(file)
        keys, maps = content["keys"].value(), content[field].value()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except KeyError as error:
        raise DataError(f"{path}: the dictionary has no {error}, only {sorted(map(str, content))}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if keys.ndim != 1 or keys.dtype.kind not in "iu" or maps.dtype.kind != "f" or len(keys) != len(maps):
        raise DataError(
            f"{path}: {keys.shape} keys of {keys.dtype} do not fit {maps.shape} maps of {maps.dtype}"
        )
    if maps.ndim != 3 or len(set(keys.tolist())) != len(keys) or (keys < 0).any():
        raise DataError(
            f"{path}: needs different, non-negative keys and (K, H, W) maps, got {keys} and {maps.shape}"
        )
    return ClipESMaps(keys.astype(np.int64), maps.astype(np.float16))


def _load(file: BinaryIO) -> dict[Any, Any]:
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if shape != () or dtype != np.dtype(object):
            raise DataError(f"an array {shape} of {dtype}, not CLIP-ES's pickled dictionary")
        outer = _ArraysOnly(file).load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"damaged or no .npy file ({error!r})") from error
    items = outer.objects() if isinstance(outer, _Array) else []
    if len(items) != 1 or not isinstance(items[0], dict):
        raise DataError("no dictionary of arrays")
    wrong = [key for key, value in items[0].items() if not isinstance(value, _Array)]
    if wrong:
        raise DataError(f"{wrong} in the dictionary are no arrays")
    return items[0]


class _DType:
    """Stands in for ``numpy.dtype``: keeps the code and the byte order, nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if not (isinstance(code, str) and (_PLAIN.match(code) or _OBJECTS.match(code))):
            raise DataError(f"the array type {code!r} is not a plain number")
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class _Array:
    """Stands in for ``numpy.ndarray``: checks what the file says before it becomes an array."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not (
            isinstance(dtype, _DType)
            and isinstance(shape, tuple)
            and all(type(side) is int for side in shape)
        ):
            raise DataError("an array without shape or type")
        self._shape, self._dtype, self._fortran, self._data = shape, dtype, bool(fortran), data

    def objects(self) -> list[Any]:
        """Return the elements of an array of objects."""
        if not isinstance(self._data, list):
            raise DataError("an array of objects without its list")
        return self._data

    def value(self) -> np.ndarray:
        """Return the array of numbers."""
        if not isinstance(self._data, bytes) or _OBJECTS.match(self._dtype.code):
            raise DataError("an array of objects where numbers should be")
        dtype = np.dtype(self._dtype.code).newbyteorder(self._dtype.order)
        try:
            array = np.frombuffer(self._data, dtype).reshape(self._shape, order="F" if self._fortran else "C")
        except ValueError as error:
            raise DataError(f"an array of shape {self._shape} with {len(self._data)} bytes") from error
        return array.astype(dtype.newbyteorder("="))


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _Array:
        raise DataError("an array of an unknown kind")
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Make the bytes of an array that Python 2's pickle protocol spells as text."""
    if encoding != "latin1":
        raise DataError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Knows the names that numpy writes for arrays, each replaced by a harmless stand-in, and no other."""

    KNOWN: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012 - read only
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a known name.

        Raises:
            DataError: For every other name.
        """
        if (module, name) not in self.KNOWN:
            raise DataError(f"asks for {module}.{name}; only plain arrays are read, nothing is executed")
        return self.KNOWN[module, name]

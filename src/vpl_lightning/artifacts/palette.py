"""Label maps as 8-bit PNG files with the VOC palette, read and written as indices."""

from __future__ import annotations

import io
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import DataError
from vpl_lightning.functional.labels import VOID

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
_KEY = "vpl_lightning"
_HEAD = 4096
"""Bytes at the start of a PNG in which its fingerprint lies: behind a 768-byte palette, before the pixels."""


@lru_cache(maxsize=1)
def _palette() -> UInt8[np.ndarray, "256 3"]:
    labels = np.arange(256, dtype=np.uint8)
    palette = np.zeros((256, 3), np.uint8)
    for octave in range(3):
        for channel in range(3):
            bit = (labels >> (3 * octave + channel)) & 1
            palette[:, channel] |= bit << (7 - octave)
    palette.setflags(write=False)
    return palette


def voc_palette() -> UInt8[np.ndarray, "256 3"]:
    """Return the RGB colours of the VOC devkit: a label's bits dealt out to red, green and blue in turn.

    Bit ``3 j + c`` of the label is bit ``7 - j`` of channel ``c``; 0 is black, 255 VOC's cream.
    """
    return _palette().copy()


def write_mask(
    path: str | Path,
    labels: Integer[np.ndarray, "H W"],
    *,
    palette: bool = True,
    fingerprint: str | None = None,
) -> None:
    """Write a label map as an 8-bit PNG, whole or not at all.

    Args:
        path: The final name.
        labels: 0 background, then classes; 255 void.
        palette: Colour indices with the VOC palette (mode P, what the VOC server takes); else grey values.
        fingerprint: Kept inside the file, see :func:`mask_fingerprint`.

    Raises:
        DataError: If a label does not fit into eight bits.
    """
    if labels.size and (labels.min() < 0 or labels.max() > VOID):
        raise DataError(f"{path}: labels must lie in 0..255, found {labels.min()} to {labels.max()}")
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette(_palette().tobytes())
    text = PngImagePlugin.PngInfo()
    if fingerprint is not None:
        text.add_text(_KEY, fingerprint)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text)
    atomic_write(path, buffer.getvalue())


def read_mask(path: str | Path, *, num_classes: int | None = None) -> UInt8[np.ndarray, "H W"]:
    """Read a label map as indices, from a palette or grey PNG of at most eight bits.

    Args:
        path: The file.
        num_classes: If given, labels must lie in ``0..num_classes - 1`` or be 255.

    Raises:
        DataError: If the file is missing, damaged, holds colours in place of indices, or an unknown label.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "1":
                raise DataError(f"{path}: a one-bit mask; labels need 8 bits, save it as palette or grey PNG")
            if image.mode not in ("P", "L"):
                raise DataError(
                    f"{path}: mode {image.mode}; a mask must hold label indices (palette or 8-bit grey PNG)"
                )
            labels = np.array(image, dtype=np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such mask") from error
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from error
    if num_classes is not None:
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        unknown = [int(label) for label in present if num_classes <= label < VOID]
        if unknown:
            raise DataError(f"{path}: labels {unknown} are neither below {num_classes} nor {VOID} (void)")
    return labels


def mask_fingerprint(path: str | Path) -> str | None:
    """Return the fingerprint in a mask of :func:`write_mask`; None if the file is not whole or has none.

    Reads a few hundred bytes, not the pixels.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
            file.seek(-len(_END), io.SEEK_END)
            whole = file.read() == _END
    except OSError:
        return None
    if not whole or not head.startswith(_SIGNATURE):
        return None
    position = len(_SIGNATURE)
    while position + 8 <= len(head):
        length, kind = int.from_bytes(head[position : position + 4], "big"), head[position + 4 : position + 8]
        if kind == b"tEXt":
            key, _, value = head[position + 8 : position + 8 + length].partition(b"\0")
            if key == _KEY.encode():
                return value.decode("latin-1")
        position += length + 12
    return None

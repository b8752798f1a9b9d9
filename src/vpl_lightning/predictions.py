"""Predictions on disk: palette masks, soft scores, pictures for looking, and what the VOC server takes."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vpl_lightning.artifacts import atomic_path, atomic_write, mask_fingerprint, read_mask, write_mask
from vpl_lightning.errors import DataError
from vpl_lightning.figures import mask_overlay
from vpl_lightning.structures import ImageArray

SERVER_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the VOC evaluation server looks for masks in an archive; comp6 is the competition with outside
data."""
SERVER_ARCHIVE = "voc2012_comp6_test_cls.tar.gz"
SERVER_CLASSES = 21
"""Labels 0 to 20; the server knows no void in predictions."""


@dataclass(frozen=True, kw_only=True)
class PredictionSpec:
    """What ``predict`` writes besides ``<id>.png``.

    Attributes:
        folder: Where; ``predictions`` below the run folder if None.
        soft: ``soft/<id>.npz`` with ``probabilities``, float16 ``(C, H, W)``.
        overlays: ``overlays/<id>.png``, the coloured mask over the image.
        server_archive: An archive of the masks for the VOC server.
    """

    folder: str | None = None
    soft: bool = False
    overlays: bool = False
    server_archive: bool = False


class PredictionWriter:
    """Writes what was predicted for one image after the other, each file whole or not at all.

    Args:
        folder: Where.
        spec: What.
    """

    def __init__(self, folder: str | Path, spec: PredictionSpec | None = None) -> None:
        self.folder = Path(folder)
        self.spec = spec or PredictionSpec()

    def write(
        self,
        image_id: str,
        image: ImageArray,
        labels: UInt8[np.ndarray, "H W"],
        probabilities: Float[np.ndarray, "C H W"] | None = None,
        *,
        fingerprint: str | None = None,
    ) -> None:
        """Write the files of one image.

        Args:
            image_id: Name of the files.
            image: As decoded.
            labels: Of its size.
            probabilities: Background first; needed where soft scores are wanted.
            fingerprint: Of all that the prediction depends on; kept in the mask.
        """
        if self.spec.soft and probabilities is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, probabilities=probabilities.astype(np.float16))
            atomic_write(self.folder / "soft" / f"{image_id}.npz", buffer.getvalue())
        if self.spec.overlays:
            buffer = io.BytesIO()
            Image.fromarray(mask_overlay(image, labels)).save(buffer, format="PNG")
            atomic_write(self.folder / "overlays" / f"{image_id}.png", buffer.getvalue())
        # The mask comes last: where it is, the rest is.
        write_mask(self.folder / f"{image_id}.png", labels, fingerprint=fingerprint)

    def has(self, image_id: str, fingerprint: str) -> bool:
        """Tell whether the files of an image are there and were made of what ``fingerprint`` stands for."""
        return mask_fingerprint(self.folder / f"{image_id}.png") == fingerprint


def write_server_archive(
    folder: str | Path, ids: Collection[str] | None = None, *, path: str | Path | None = None
) -> Path:
    """Pack masks as the VOC evaluation server takes them, see :data:`SERVER_FOLDER`.

    The archive is a function of the masks alone, whoever packs them when.

    Args:
        folder: Of ``<id>.png``.
        ids: Images that belong in; all masks of the folder if None.
        path: The archive, a ``.tar.gz``; beside the masks if None.

    Returns:
        Its path.

    Raises:
        DataError: If a mask is missing, or one has a label beyond 20; the server would refuse it.
    """
    folder = Path(folder)
    names = sorted(ids if ids is not None else (mask.stem for mask in folder.glob("*.png")))
    if not names:
        raise DataError(f"{folder} has no masks for the server; run 'vpl predict' on the test split first")
    target = folder / SERVER_ARCHIVE if path is None else Path(path)
    with (
        atomic_path(target) as partial,
        partial.open("wb") as stream,
        gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in names:
            mask = folder / f"{name}.png"
            largest = int(read_mask(mask).max())
            if largest >= SERVER_CLASSES:
                raise DataError(f"{mask} has label {largest}; the VOC server takes 0 to {SERVER_CLASSES - 1}")
            content = mask.read_bytes()
            entry = tarfile.TarInfo(f"{SERVER_FOLDER}/{name}.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target

"""A small mask stage over generated images, to be killed and started again.

``python -m tests.masks.mask_run FOLDER``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vpl_lightning.mask_stream import PseudoMaskStream
from vpl_lightning.structures import ClassCAMs, ImageArray

IMAGES = 16
SIZE = (90, 120)


def images_and_maps() -> Iterator[tuple[str, ImageArray, ClassCAMs]]:
    """Yield flat patches of colour with soft blobs as maps."""
    for index in range(IMAGES):
        rng = np.random.default_rng(index)
        tiles = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(15, 0).repeat(15, 1)
        image = np.clip(tiles + rng.normal(0, 4, tiles.shape), 0, 255).astype(np.uint8)
        coarse = torch.from_numpy(rng.random((1, 2, 3, 4), np.float32))
        maps = F.interpolate(coarse, (6, 8), mode="bicubic")[0].clamp(0, 1)
        yield f"image_{index:02d}", image, ClassCAMs(torch.tensor([7, index]), maps / 2, maps, SIZE)


def run(folder: Path, *, workers: int, backwards: bool = False) -> None:
    """Make the masks and maps that are missing."""
    items = list(images_and_maps())
    with PseudoMaskStream(
        folder / "masks", settings={"prototypes": "abc"}, workers=workers, maps_folder=folder / "maps"
    ) as stream:
        done = stream.done_ids()
        for image_id, image, maps in reversed(items) if backwards else items:
            if image_id not in done:
                stream.submit(image_id, image, maps)


if __name__ == "__main__":
    run(Path(sys.argv[1]), workers=1)

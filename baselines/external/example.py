"""What an outside checkout has to provide for ``external``: a command from files to files. Needs no torch.

Its maps are the colours of an image weighted by the first three numbers of each prototype: a stand-in for a
method.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(images: str, labels: str, prototypes: str, output: str) -> None:
    """Write ``<image>.npy`` with CLIP-ES's dictionary for every image of the labels file."""
    rows = np.load(prototypes)
    for name, ids in json.loads(Path(labels).read_text())["labels"].items():
        colours = np.asarray(Image.open(Path(images, f"{name}.png")), np.float32) / 255
        maps = np.stack([colours @ rows[label, :3] for label in ids])
        maps -= maps.min((1, 2), keepdims=True)
        maps /= maps.max((1, 2), keepdims=True) + 1e-7
        content = {"keys": np.array(ids), "attn_highres": maps.astype(np.float16)}
        np.save(Path(output, f"{name}.npy"), np.array(content, dtype=object))


if __name__ == "__main__":
    main(*sys.argv[1:])

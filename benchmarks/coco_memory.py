"""Measure how much memory training on COCO takes after ``vpl prepare coco``, against the number of images.

    python benchmarks/coco_memory.py coco_memory --images 10000 100000 --json coco_memory.json

For every size it writes a synthetic COCO in the official format below the folder: an instances JSON with one
polygon of one category an image, and the images, hard links to a few JPEG. ``vpl prepare coco`` paints masks and
writes the index, in a process of its own. Then a fresh process reads what phase 1 and phase 2 read: the tagged
images without masks, and random views with masks, the same number of batches whatever the size. The figure is
the peak resident size of that process and, with worker processes, of the largest of those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT = "made2014"
"""No official split, whose count ``prepare`` would miss."""
SIZE = (48, 64)
"""(H, W) of the images in pixels; small, since only their number matters here."""
LINKS = 10_000
"""Images that are hard links to one file; file systems allow some 65,000."""
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ``ru_maxrss``."""


def write_coco(root: Path, count: int) -> None:
    """Write images and ``annotations/instances_made2014.json``."""
    folder = root / SPLIT
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(count):
        name = f"COCO_{SPLIT}_{number:012d}.jpg"
        first = folder / f"COCO_{SPLIT}_{number - number % LINKS:012d}.jpg"
        if number % LINKS == 0:
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(first)
        else:
            (folder / name).hardlink_to(first)
        left, top = rng.uniform(0, 30), rng.uniform(0, 20)
        outline = [left, top, left + 20, top + 3, left + 12, top + 18]
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "iscrowd": 0,
                "area": 150.0,
                "segmentation": [[round(float(value), 2) for value in outline]],
            }
        )
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{SPLIT}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def read_training_data(root: Path, *, batches: int, workers: int) -> dict[str, float]:
    """Read batches of both phases; return peak memory in MiB, of this process and of its largest worker."""
    from vpl_lightning.data import COCODataModule

    imported = peak(resource.RUSAGE_SELF)
    data = COCODataModule(
        str(root),
        train_split=SPLIT,
        val_split=SPLIT,
        num_workers=workers,
        crop_size=32,
        train_masks="truth",
    )
    found = 0
    for loader in (data.localisation_dataloader(8), data.train_dataloader()):
        found += sum(1 for _ in islice(loader, batches))
    if found != 2 * batches:
        raise SystemExit(f"{found} batches of {2 * batches}; take fewer --batches")
    return {
        "imported": imported,
        "main": peak(resource.RUSAGE_SELF),
        "worker": peak(resource.RUSAGE_CHILDREN),
    }


def peak(who: int) -> float:
    """Return a peak resident size in MiB."""
    return resource.getrusage(who).ru_maxrss * RSS_UNIT / 2**20


def measure(root: Path, count: int, *, batches: int, workers: int) -> dict[str, float]:
    """Make a COCO unless it is there, prepare it, and read it in a fresh process."""
    place = root / str(count)
    if not (place / "annotations").is_dir():
        write_coco(place, count)
    prepare = [sys.executable, "-m", "vpl_lightning", "prepare", "coco", str(place), f"--splits=[{SPLIT}]"]
    subprocess.run(prepare, check=True)
    options = ["--read", f"--batches={batches}", f"--workers={workers}"]
    words = [sys.executable, __file__, str(place), *options]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the synthetic COCOs are made")
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--batches", type=int, default=500, help="of each phase")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of a loader")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--read", action="store_true", help="read FOLDER and print its figures")
    arguments = parser.parse_args()
    options = {"batches": arguments.batches, "workers": arguments.workers}
    if arguments.read:
        print(json.dumps(read_training_data(arguments.folder, **options)))
        return
    rows = {count: measure(arguments.folder, count, **options) for count in arguments.images}
    first = rows[arguments.images[0]]
    print("images   imported MiB   main MiB   largest worker MiB   against the first")
    for count, row in rows.items():
        change = (row["main"] + row["worker"]) / (first["main"] + first["worker"]) - 1
        print(
            f"{count:>7} {row['imported']:>13.1f} {row['main']:>10.1f} {row['worker']:>20.1f} {change:>+18.1%}"
        )
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        content = {"machine": machine, **options, "peak_mib": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

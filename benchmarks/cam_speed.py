"""Time CLIP-ES maps of a whole image against the floor, a bare forward pass, and measure peak memory.

    python benchmarks/cam_speed.py --threads 2 --rounds 9 --json cam_speed.json

The model is a ViT-B/16 with random weights: the arithmetic does not depend on them, the maps mean nothing.
The floor embeds the image and runs all twelve blocks with torch's fused attention and nothing kept. A whole
image is everything from decoded pixels to maps at image size: resize, blocks, last block, channel weights,
affinity, boxes, upsampling.

Every round runs each case once, in a new order, so that a busy machine slows all of them alike; ratios are
taken within a round and the median over rounds is shown, by the clock on the wall and by processor time.
Memory is the peak resident size of a fresh process that does nothing but load the model and make the maps
with the most classes.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from vpl_baselines.clip_es import ClipES

from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.structures import ImageArray

FLOOR = "floor"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ``ru_maxrss``."""


@dataclass(frozen=True)
class Timing:
    """Seconds an image by the wall clock and by processor time, and their ratios to the floor: medians."""

    size: str
    case: str
    wall: float
    processor: float
    wall_ratio: float
    processor_ratio: float


def generator(precision: str) -> ClipES:
    """Build a ViT-B/16 with its full-size text tower, random weights, and CLIP-ES with VOC's classes on it."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=12, width=768, head_width=64, patch_size=16, image_size=224)
    model = CLIP(512, vision, CLIPTextCfg(width=512, heads=8, layers=12), quick_gelu=True)
    return ClipES(CLIPEncoder(model, precision=precision), "voc")


def picture(height: int, width: int) -> ImageArray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cases(clip_es: ClipES, image: ImageArray, classes: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    encoder = clip_es.encoder
    pixels = encoder.normalise(encoder.resize(image)[None])
    found: dict[str, Callable[[], object]] = {FLOOR: lambda: encoder.encode_image(pixels)}
    for count in classes:
        labels = list(range(count))
        found[f"{count} classes"] = lambda labels=labels: clip_es.generate(image, labels).refined
    return found


def measure(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return wall and processor seconds of each case in each round, after one round that does not count."""
    order = list(functions)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            wall, processor = time.perf_counter(), time.process_time()
            functions[name]()
            if number:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def summarise(size: str, seconds: Mapping[str, Sequence[tuple[float, float]]]) -> list[Timing]:
    rows = []
    for name, own in seconds.items():
        pairs = list(zip(own, seconds[FLOOR], strict=True))
        values = [median(one[clock] for one in own) for clock in (0, 1)]
        ratios = [median(one[clock] / floor[clock] for one, floor in pairs) for clock in (0, 1)]
        rows.append(Timing(size, name, *values, *ratios))
    return rows


def peak_memory(options: argparse.Namespace, *, classes: int) -> int:
    """Return the peak resident bytes of a process that makes maps with so many classes; none: only loads."""
    command = [sys.executable, __file__, "--peak-of", str(classes), "--sizes", options.sizes[0]]
    command += ["--threads", str(options.threads), "--precision", options.precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak(options: argparse.Namespace) -> int:
    """Make maps of one image three times, if any, and return the peak resident bytes of this process."""
    clip_es = generator(options.precision)
    image = picture(*shape(options.sizes[0]))
    for _ in range(3 if options.peak_of else 0):
        _ = clip_es.generate(image, range(options.peak_of)).refined
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def shape(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["375x500"], help="height x width in pixels")
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 4], help="classes in the image")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="float32", help="of the blocks before the last")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak_of is not None:
        print(own_peak(options))
        return
    clip_es = generator(options.precision)
    timings = []
    for size in options.sizes:
        functions = cases(clip_es, picture(*shape(size)), options.classes)
        timings += summarise(size, measure(functions, options.rounds))
    print(f"{'image':>9} {'case':>10} {'wall s':>8} {'ratio':>6} {'cpu s':>8} {'ratio':>6}")
    for row in timings:
        print(
            f"{row.size:>9} {row.case:>10} {row.wall:8.3f} {row.wall_ratio:6.3f} "
            f"{row.processor:8.3f} {row.processor_ratio:6.3f}"
        )
    most = max(options.classes)
    loaded, peak = peak_memory(options, classes=0), peak_memory(options, classes=most)
    print(
        f"peak resident memory: {peak / 1e6:.0f} MB with {most} classes, {loaded / 1e6:.0f} MB of it to load"
    )
    if options.json:
        report = {
            "timings": [asdict(row) for row in timings],
            "peak_bytes": peak,
            "loaded_bytes": loaded,
            "peak_classes": most,
            "settings": {
                key: value for key, value in vars(options).items() if key not in ("json", "peak_of")
            },
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

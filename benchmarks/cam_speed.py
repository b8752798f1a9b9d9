"""Time CLIP-ES maps of a whole image against the floor, a bare forward pass, and measure peak memory.

    python benchmarks/cam_speed.py --threads 2 --rounds 9 --json cam_speed.json

The model is a ViT-B/16 with random weights: the arithmetic does not depend on them, the maps mean nothing.
The floor embeds the image and runs all twelve blocks with torch's fused attention and nothing kept; beside it
stands the same by torch's own modules, as other codes do it. A whole image is everything from decoded pixels to
maps at image size: resize, blocks, last block, channel weights, affinity, boxes, upsampling.

Every round runs each case once, in a new order, so that a busy machine slows all of them alike; ratios are
taken within a round and the median over rounds is shown, by the clock on the wall and by processor time.
With more threads than idle cores both mean little, because fused attention waits for other threads less often
than attention that is kept: on a busy machine take ``--threads 1`` and processor time.
Memory is the peak resident size of a fresh process that imports, loads the model, encodes the texts and makes
the maps with the most classes, after each of these.
"""

from __future__ import annotations

import argparse
import json
import math
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
from module_forward import ModuleEncoder
from vpl_baselines.clip_es import ClipES
from vpl_baselines.clip_es.adapter import Gradient

from vpl_lightning.cli.process import tune
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.clip.model import CLIP, TowerSize
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


def generator(precision: str, device: str = "cpu", *, modules: bool = False) -> ClipES:
    """Build a ViT-B/16 with its full-size text tower, random weights, and CLIP-ES with VOC's classes on it.

    With ``modules`` as CLIP-ES does it: torch's own modules, and a backward pass a class.
    """
    torch.manual_seed(0)
    model = CLIP(
        vision=TowerSize(width=768, heads=12, layers=12, hidden=3072),
        text=TowerSize(width=512, heads=8, layers=12, hidden=2048),
        patch_size=16,
        native_patches=14 * 14,
        context_length=77,
        vocabulary=49408,
        joint_width=512,
        quick_gelu=True,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.constant_(model.logit_scale, math.log(100))
    kind = ModuleEncoder if modules else CLIPEncoder
    gradient: Gradient = "autograd" if modules else "closed_form"
    clip_es = ClipES(kind(model, precision=precision), "voc", gradient=gradient).to(device)
    clip_es.encoder.drop_text()  # as a run does
    return clip_es


def picture(height: int, width: int) -> ImageArray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cases(clip_es: ClipES, image: ImageArray, classes: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    encoder = clip_es.encoder
    pixels = encoder.normalise(encoder.resize(image)[None])
    by_modules = ModuleEncoder(encoder.model)
    found: dict[str, Callable[[], object]] = {
        FLOOR: lambda: encoder.encode_image(pixels),
        "floor by modules": lambda: by_modules.encode_image(pixels),
    }
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


def peak_memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the peak resident bytes of a fresh process after each stage of its life."""
    command = [sys.executable, __file__, "--memory", "--sizes", options.sizes[0]]
    command += ["--precision", options.precision, "--threads", str(options.threads)]
    command += ["--classes", str(max(options.classes))]
    peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {str(stage): int(peak) for stage, peak in peaks.items()}


def own_peaks(options: argparse.Namespace) -> dict[str, int]:
    """Load the model, make the maps of one image three times; return this process's peak after each step."""
    peaks = {"imports": peak_bytes()}
    clip_es = generator(options.precision)
    peaks["model and text"] = peak_bytes()
    image = picture(*shape(options.sizes[0]))
    for _ in range(3):
        _ = clip_es.generate(image, range(options.classes[0])).refined
    peaks["maps"] = peak_bytes()
    return peaks


def peak_bytes() -> int:
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
    parser.add_argument("--memory", action="store_true", help="print peak memory alone, as JSON")
    return parser.parse_args()


def main() -> None:
    tune()  # as vpl does
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(own_peaks(options)))
        return
    peaks = peak_memory(options)  # first: a process inherits the peak of the one that starts it
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
    print(
        "peak resident MB after " + ", ".join(f"{stage}: {peak / 1e6:.0f}" for stage, peak in peaks.items())
    )
    if options.json:
        report = {
            "timings": [asdict(row) for row in timings],
            "peak_bytes": peaks,
            "settings": {key: value for key, value in vars(options).items() if key not in ("json", "memory")},
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The stages of ``speed.py`` that make pseudo-masks."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cam_speed
import numpy as np
from PIL import Image
from speed_timing import Row, interleaved, ratio_of
from vpl_baselines.clip_es import ClipES

from vpl_lightning.artifacts import read_clip_es, write_clip_es, write_mask
from vpl_lightning.mask_stream import PseudoMaskStream
from vpl_lightning.masks import MaskConfig, make_mask
from vpl_lightning.structures import ImageArray

Photo = tuple[str, ImageArray, list[int]]


def masks(options: argparse.Namespace) -> list[Row]:
    """Time pseudo-masks as a stream and as two passes in sequence.

    Two passes run with the stream's own maps, and as CLIP-ES has them: torch's modules and a backward pass a
    class, then half-precision maps at image size on the disk. No schedule beats the processor time of the two
    passes, spread evenly over the cores: the last line says what is left to gain. On a CPU the stream also
    runs with the frozen blocks in bfloat16, which pays where the processor multiplies it.
    """
    photos = _photographs(options)
    streams, passes = [Job(_stream)], [Job(_two_passes), Job(_two_passes, modules=True)]
    if options.device == "cpu":
        streams.append(Job(_stream, precision="bfloat16"))
    generators = {
        job: cam_speed.generator(job.precision, options.device, modules=job.modules)
        for job in (*streams, passes[1])
    }
    generators[passes[0]] = generators[streams[0]]
    costs: dict[Job, list[Cost]] = {job: [] for job in (*streams, *passes)}
    for _ in range(options.rounds):
        for job, own in costs.items():
            own.append(_cost(job.work, generators[job], photos, options.scratch))
    rows = [_row(job.name, own, len(photos)) for job, own in costs.items()]
    seconds = {job: [cost.seconds for cost in own] for job, own in costs.items()}
    for job in passes:
        for stream in streams:
            rows.append(Row(job.name, 0.0, ratio_of(seconds[job], seconds[stream]), stream.name))
    if options.device == "cpu":
        least = [cost.processor / options.threads for cost in costs[passes[0]]]
        case = "two passes' processor time over the cores"
        rows.append(Row(streams[0].name, 0.0, ratio_of(seconds[streams[0]], least), case))
    return rows


def growth(options: argparse.Namespace) -> list[Row]:
    """Time the stream on a quarter of the photographs, then on the same twice and four times."""
    photos = _photographs(options)[: options.images // 4]
    generator = cam_speed.generator("float32", options.device)
    costs: dict[int, list[Cost]] = {1: [], 2: [], 4: []}
    _cost(_stream, generator, photos, options.scratch)  # memory of a process that has warmed up
    for _ in range(options.rounds):
        for times, own in costs.items():
            more = [(f"{turn}-{name}", *rest) for turn in range(times) for name, *rest in photos]
            own.append(_cost(_stream, generator, more, options.scratch))
    rows = [
        _row(f"stream, {times * len(photos)} images", own, times * len(photos))
        for times, own in costs.items()
    ]
    for times, twice in ((1, 2), (2, 4)):
        ratio = ratio_of([cost.seconds for cost in costs[twice]], [cost.seconds for cost in costs[times]])
        rows.append(Row(f"{twice * len(photos)} images", 0.0, ratio, f"{times * len(photos)} images"))
    return rows


def refiners(options: argparse.Namespace) -> list[Row]:
    """Time the dense CRF, in one process on one core, and PAMR."""
    (_, image, labels), *_ = _photographs(options)
    found = cam_speed.generator("float32", options.device).generate(image, labels)
    maps, classes = found.affinity.cpu().numpy(), found.classes.cpu().numpy()
    crf, pamr = interleaved(
        [
            lambda: make_mask(image, maps, classes, MaskConfig()),
            lambda: make_mask(image, maps, classes, MaskConfig(refiner="pamr"), device=options.device),
        ],
        options.rounds,
    )
    return [Row("dense CRF", median(crf)), Row("PAMR", median(pamr), ratio_of(pamr, crf), "dense CRF")]


@dataclass(frozen=True)
class Job:
    """A way to make pseudo-masks."""

    work: Callable[[ClipES, Sequence[Photo], Path], None]
    modules: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        """Name in the table."""
        name = self.work.__name__.strip("_").replace("_", " ") + (" as CLIP-ES" if self.modules else "")
        return name + (f", {self.precision}" if self.precision != "float32" else "")


class Cost(NamedTuple):
    """What a job took."""

    seconds: float
    processor: float
    """Seconds of this process, over all of its threads."""
    bytes_written: int
    peak_bytes: int
    """Of this process so far."""


def _cost(
    work: Callable[[ClipES, Sequence[Photo], Path], None],
    generator: ClipES,
    photos: Sequence[Photo],
    scratch: str | None,
) -> Cost:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        begun, spent = time.perf_counter(), time.process_time()
        work(generator, photos, Path(folder))
        seconds, spent = time.perf_counter() - begun, time.process_time() - spent
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return Cost(seconds, spent, size, cam_speed.peak_bytes())


def _row(name: str, costs: Sequence[Cost], images: int) -> Row:
    return Row(
        name,
        median(cost.seconds for cost in costs) / images,
        bytes_written=costs[0].bytes_written // images,
        note=f"peak so far {costs[0].peak_bytes / 1e9:.2f} GB",
    )


def _two_passes(generator: ClipES, photos: Sequence[Photo], folder: Path) -> None:
    """CLIP-ES's way: all maps at image size to the disk, then the CRF of one image after another."""
    for name, image, labels in photos:
        found = generator.generate(image, labels)
        write_clip_es(folder / f"{name}.npy", found.classes.cpu().numpy(), found.refined.cpu().numpy())
    for name, image, _ in photos:
        stored = read_clip_es(folder / f"{name}.npy")
        labels = make_mask(image, stored.attn_highres.astype(np.float32), stored.keys, MaskConfig())
        write_mask(folder / f"{name}.png", labels)


def _stream(generator: ClipES, photos: Sequence[Photo], folder: Path) -> None:
    with PseudoMaskStream(folder, settings={}) as stream:
        for name, image, labels in photos:
            stream.submit(name, image, generator.generate(image, labels))


def _photographs(options: argparse.Namespace) -> list[Photo]:
    """Tagged photographs of a data set, or smooth noise with one to three tags."""
    if options.root:
        from vpl_lightning.data import VOCDataModule  # brings Lightning, which no other section needs

        photos = VOCDataModule(options.root).localisation_dataset("train")
        samples = (photos[row] for row in range(options.images))
        return [(sample["id"], sample["image"], list(sample["labels"])) for sample in samples]
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (options.images, 12, 16, 3), dtype=np.uint8)
    pictures = [
        np.asarray(Image.fromarray(one).resize((500, 375), Image.Resampling.BICUBIC)) for one in coarse
    ]
    return [(str(row), image, list(range(1 + row % 3))) for row, image in enumerate(pictures)]

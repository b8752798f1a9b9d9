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
    """Time pseudo-masks as a stream, of a quarter, a half and all images, and as two passes in sequence.

    Two passes run with the stream's own maps, and as CLIP-ES has them: torch's modules and a backward pass a
    class, then half-precision maps at image size on the disk. A stream
    starts its processes first, so that its growth is told by the differences. No schedule beats the processor
    time of the two passes, spread evenly over the cores: the last line says what is left to gain. On a CPU the
    stream also runs with the frozen blocks in bfloat16, which pays where the processor multiplies it.
    """
    photos = _photographs(options)
    quarter, half, whole = (Job(_stream, len(photos) // share) for share in (4, 2, 1))
    passes, released = Job(_two_passes, len(photos)), Job(_two_passes, len(photos), modules=True)
    streams = [whole]
    if options.device == "cpu":
        streams.append(Job(_stream, len(photos), precision="bfloat16"))
    jobs = [quarter, half, whole, passes, released, *streams[1:]]
    generators: dict[tuple[str, bool], ClipES] = {}
    costs: dict[Job, list[Cost]] = {job: [] for job in jobs}
    for _ in range(options.rounds):
        for job in jobs:
            kind = (job.precision, job.modules)
            if kind not in generators:
                generators[kind] = cam_speed.generator(job.precision, options.device, modules=job.modules)
            costs[job].append(_cost(job, generators[kind], photos, options.scratch))
    seconds = {job: [cost.seconds for cost in costs[job]] for job in jobs}
    rows = [
        Row(
            job.name,
            median(seconds[job]) / job.images,
            bytes_written=costs[job][0].bytes_written // job.images,
            note=f"peak so far {costs[job][0].peak_bytes / 1e9:.2f} GB",
        )
        for job in jobs
    ]
    sizes = zip(seconds[quarter], seconds[half], seconds[whole], strict=True)
    growth = median((four - two) / (two - one) for one, two, four in sizes)
    rows.append(Row("half to all images", 0.0, growth, "a quarter to half"))
    for job in (passes, released):
        for stream in streams:
            rows.append(Row(job.name, 0.0, ratio_of(seconds[job], seconds[stream]), stream.name))
    if options.device == "cpu":
        least = [cost.processor / options.threads for cost in costs[passes]]
        rows.append(
            Row(whole.name, 0.0, ratio_of(seconds[whole], least), "two passes' processor time over the cores")
        )
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
    """A way to make pseudo-masks of the first photographs."""

    work: Callable[[ClipES, Sequence[Photo], Path], None]
    images: int
    modules: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        """Name in the table."""
        name = f"{self.work.__name__.strip('_').replace('_', ' ')}, {self.images} images"
        name += " as CLIP-ES" if self.modules else ""
        return name + (f", {self.precision}" if self.precision != "float32" else "")


class Cost(NamedTuple):
    """What a job took."""

    seconds: float
    processor: float
    """Seconds of this process, over all of its threads."""
    bytes_written: int
    peak_bytes: int
    """Of this process so far."""


def _cost(job: Job, generator: ClipES, photos: Sequence[Photo], scratch: str | None) -> Cost:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        begun, spent = time.perf_counter(), time.process_time()
        job.work(generator, photos[: job.images], Path(folder))
        seconds, spent = time.perf_counter() - begun, time.process_time() - spent
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return Cost(seconds, spent, size, cam_speed.peak_bytes())


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

"""The stages that ``speed.py`` times, each against the floor that its arithmetic sets."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import cam_speed
import numpy as np
import torch
from PIL import Image
from vpl_baselines.clip_es import ClipES

from vpl_lightning.artifacts import read_clip_es, write_clip_es, write_mask
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.functional.targets import Selected
from vpl_lightning.mask_stream import PseudoMaskStream
from vpl_lightning.masks import MaskConfig, make_mask
from vpl_lightning.store import FeatureStore, MemorySamples, objective_from
from vpl_lightning.structures import ImageArray

FOREGROUND, WIDTH = 20, 512
"""Classes of VOC, joint width of ViT-B/16."""
PIXELS = 500
"""Samples an image in the sections of phase 1."""
BLOCK = 32
"""Images a block of the store."""


@dataclass(frozen=True)
class Row:
    """One line of the table; medians over the rounds."""

    case: str
    seconds: float
    """An image, or a pass of phase 1."""
    ratio: float | None = None
    """Time over that of ``floor``, taken within a round."""
    floor: str = ""
    bytes_written: int | None = None
    """An image."""
    note: str = ""


def maps(options: argparse.Namespace) -> list[Row]:
    """Time whole images with one, two and four classes against a bare forward, at two sizes."""
    generator = cam_speed.generator("float32", options.device)
    rows = []
    for size in ("375x500", "530x707"):
        functions = cam_speed.cases(generator, cam_speed.picture(*cam_speed.shape(size)), (1, 2, 4))
        seconds = cam_speed.measure(functions, options.rounds)
        note = f"peak so far {cam_speed.peak_bytes() / 1e9:.2f} GB"
        for row in cam_speed.summarise(size, seconds):
            rows.append(Row(f"{size}, {row.case}", row.wall, row.wall_ratio, "bare forward", note=note))
        each = [
            (four[0] / one[0]) ** (1 / 3)
            for one, four in zip(seconds["1 classes"], seconds["4 classes"], strict=True)
        ]
        rows.append(Row(f"{size}, each further class", 0.0, median(each), "one class less"))
    return rows


def step(options: argparse.Namespace) -> list[Row]:
    """Time a pass of phase 1 against its two matrix products, on float32 features that are there already."""
    source = MemorySamples.of(_samples(options.images * 10), rows=_columns().rows, width=WIDTH)
    objective = objective_from(source, _columns(), _text(), PrototypeRecipe())
    rows = torch.nn.Parameter(objective.initial())
    chunks = [chunk.features.float() for chunk in source.chunks()]
    prototypes = rows.detach().float()

    def products() -> None:
        for features in chunks:
            logits = features @ prototypes.T
            logits.T @ features

    solver = PrototypeRecipe().solver.build([rows])

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = objective(rows)
        loss.backward()
        return loss

    def whole() -> None:
        solver.step(closure)

    floor, own = _interleaved([products, whole], options.rounds)
    samples = sum(len(chunk) for chunk in chunks)
    return [
        Row("two products", median(floor), note=f"{samples:,} samples"),
        Row("whole step", median(own), _ratio(own, floor), "two products"),
    ]


def store(options: argparse.Namespace) -> list[Row]:
    """Time a pass over samples on disk; peak memory is what counts."""
    blocks = -(-options.samples // (BLOCK * PIXELS))
    images = list(_samples(BLOCK))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        place = FeatureStore(folder, {}, rows=_columns().rows, width=WIDTH)
        place.prepare()
        begun = time.perf_counter()
        for block in range(blocks):
            place.write(block, [f"{block}-{image}" for image in range(BLOCK)], images)
        writing = (time.perf_counter() - begun) / (blocks * BLOCK)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        objective = objective_from(place, _columns(), _text(), PrototypeRecipe())
        prototypes = objective.initial()
        passes = _interleaved([lambda: objective.evaluate(prototypes)], 2)[0]
    count = blocks * BLOCK * PIXELS
    return [
        Row("write a block, an image", writing, bytes_written=size // (blocks * BLOCK)),
        Row("pass over the disk", median(passes), note=f"{count:,} samples, {size / 1e9:.2f} GB"),
    ]


def masks(options: argparse.Namespace) -> list[Row]:
    """Time pseudo-masks as a stream, of a quarter, a half and all images, and as two passes in sequence.

    A stream starts its processes first, so that its growth is told by the differences. No schedule beats the
    processor time of the two passes, spread evenly over the cores: the last line says what is left to gain.
    """
    generator = cam_speed.generator("float32", options.device)
    photos = _photographs(options)
    counts = [len(photos) // 4, len(photos) // 2, len(photos)]
    rows, seconds = [], []
    for work, count in [*((_stream, count) for count in counts), (_two_passes, counts[-1])]:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            begun, spent = time.perf_counter(), time.process_time()
            work(generator, photos[:count], Path(folder), MaskConfig())
            seconds.append(time.perf_counter() - begun)
            spent = time.process_time() - spent
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        name = f"{work.__name__.strip('_').replace('_', ' ')}, {count} images"
        note = f"peak so far {cam_speed.peak_bytes() / 1e9:.2f} GB"
        rows.append(Row(name, seconds[-1] / count, bytes_written=size // count, note=note))
    growth = (seconds[2] - seconds[1]) / (seconds[1] - seconds[0])
    rows.append(Row("half to all images", 0.0, growth, "a quarter to half"))
    rows.append(Row("two passes", 0.0, seconds[3] / seconds[2], "stream"))
    if options.device == "cpu":
        least = spent / options.threads
        rows.append(Row("two passes, processor time over the cores", least / counts[-1]))
        rows.append(Row("stream", 0.0, seconds[2] / least, "that"))
    return rows


def refiners(options: argparse.Namespace) -> list[Row]:
    """Time the dense CRF, in one process on one core, and PAMR."""
    (_, image, labels), *_ = _photographs(options)
    found = cam_speed.generator("float32", options.device).generate(image, labels)
    maps, classes = found.affinity.cpu().numpy(), found.classes.cpu().numpy()
    crf, pamr = _interleaved(
        [
            lambda: make_mask(image, maps, classes, MaskConfig()),
            lambda: make_mask(image, maps, classes, MaskConfig(refiner="pamr"), device=options.device),
        ],
        options.rounds,
    )
    return [Row("dense CRF", median(crf)), Row("PAMR", median(pamr), _ratio(pamr, crf), "dense CRF")]


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "maps": maps,
    "step": step,
    "store": store,
    "masks": masks,
    "refiners": refiners,
}

Photo = tuple[str, ImageArray, list[int]]


def _two_passes(generator: ClipES, photos: Sequence[Photo], folder: Path, config: MaskConfig) -> None:
    """CLIP-ES's way: all maps at image size to the disk, then the CRF of one image after another."""
    for name, image, labels in photos:
        found = generator.generate(image, labels)
        write_clip_es(folder / f"{name}.npy", found.classes.cpu().numpy(), found.refined.cpu().numpy())
    for name, image, _ in photos:
        stored = read_clip_es(folder / f"{name}.npy")
        labels = make_mask(image, stored.attn_highres.astype(np.float32), stored.keys, config)
        write_mask(folder / f"{name}.png", labels)


def _stream(generator: ClipES, photos: Sequence[Photo], folder: Path, config: MaskConfig) -> None:
    with PseudoMaskStream(folder, config, settings={}) as stream:
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


def _columns() -> Columns:
    return Columns(FOREGROUND, FOREGROUND, PrototypeRecipe().targets.background)


def _text() -> torch.Tensor:
    rows = torch.randn(2 * FOREGROUND, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=-1)


def _samples(images: int) -> Iterator[Selected]:
    """Random unit features with soft targets."""
    draw = torch.Generator().manual_seed(0)
    rows = _columns().rows
    for _ in range(images):
        features = torch.nn.functional.normalize(torch.randn(PIXELS, WIDTH, generator=draw), dim=-1)
        targets = torch.rand(PIXELS, rows, generator=draw)
        yield Selected(
            features.half(),
            targets / targets.sum(-1, keepdim=True),
            torch.ones(PIXELS),
            torch.ones(rows, dtype=torch.bool),
            torch.arange(PIXELS),
        )


def _interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return seconds of each function in each round, in a new order each; a first round does not count."""
    seconds: list[list[float]] = [[] for _ in functions]
    order, shuffle = list(range(len(functions))), random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        for index in order:
            begun = time.perf_counter()
            functions[index]()
            if number:
                seconds[index].append(time.perf_counter() - begun)
    return seconds


def _ratio(own: Sequence[float], floor: Sequence[float]) -> float:
    return median(one / other for one, other in zip(own, floor, strict=True))

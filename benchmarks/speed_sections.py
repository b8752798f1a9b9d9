"""The stages that ``speed.py`` times, each against the floor that its arithmetic sets."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import cam_speed
import torch
from speed_masks import growth, masks, refiners
from speed_timing import Row, interleaved, ratio_of

from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.functional.targets import Selected
from vpl_lightning.store import FeatureStore, MemorySamples, objective_from

FOREGROUND, WIDTH = 20, 512
"""Classes of VOC, joint width of ViT-B/16."""
PIXELS = 500
"""Samples an image in the sections of phase 1."""
BLOCK = 32
"""Images a block of the store."""


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

    floor, own = interleaved([products, whole], options.rounds)
    samples = sum(len(chunk) for chunk in chunks)
    return [
        Row("two products", median(floor), note=f"{samples:,} samples"),
        Row("whole step", median(own), ratio_of(own, floor), "two products"),
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
        passes = interleaved([lambda: objective.evaluate(prototypes)], 2)[0]
    count = blocks * BLOCK * PIXELS
    return [
        Row("write a block, an image", writing, bytes_written=size // (blocks * BLOCK)),
        Row("pass over the disk", median(passes), note=f"{count:,} samples, {size / 1e9:.2f} GB"),
    ]


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "maps": maps,
    "step": step,
    "store": store,
    "masks": masks,
    "growth": growth,
    "refiners": refiners,
}


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

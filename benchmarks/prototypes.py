"""Score text against vision prototypes with several CLIPs: maps, pseudo-masks, gap; mean and deviation.

    python benchmarks/prototypes.py scenes --encoders tiny0.safetensors tiny1.safetensors ... --out tables
    python benchmarks/prototypes.py photos --root VOC2012 --encoders photo0.safetensors ... --out tables

Phase 1 reads the tags of the training images alone, and at most ``--pixels`` patches of each. The scored
images chose no setting, and no threshold is tuned on the truth: the background score is CLIP-ES's
``1 - max``. The rows share encoder and generator:

=============== ==========================================================================================
text            text prototypes at the CLIP's own scale
text, ours      text prototypes at the scale that our vision prototypes are used with
paper           the library's preset ``paper``
ours            the library's preset ``default``
=============== ==========================================================================================
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
from command_line import command
from jaxtyping import Float
from torch import Tensor
from train_photo_clip import CLASSES

from vpl_lightning import CAMGenerator
from vpl_lightning.data import SegmentationDataModule, ShapesDataModule, VOCDataModule
from vpl_lightning.data.images import TaggedImages
from vpl_lightning.functional.gap import gap_centroid
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.masks import MaskConfig
from vpl_lightning.specs import EncoderSpec
from vpl_lightning.tasks import VisionPrototypeModule
from vpl_lightning.tasks.localisation_scores import LocalisationScores, RegionSums

COLUMNS = ("raw", "refined", "mask", "gap")
"""mIoU of maps, refined maps and pseudo-masks in per cent; distance to the true regions."""
RECIPES = {"paper": "paper", "ours": "default"}
"""Rows that phase 1 learns, and the library's names of their settings."""
Table = dict[str, dict[str, float]]
"""Scores by row and column."""


@dataclass(frozen=True)
class Row:
    """Prototypes to score, and the scale to use them with."""

    name: str
    prototypes: Float[Tensor, "C D"]
    scale: float


def fit(module: VisionPrototypeModule, data: SegmentationDataModule, root: Path) -> VisionPrototypeModule:
    """Run phase 1."""
    trainer = lightning.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def score(generator: CAMGenerator, rows: Sequence[Row], images: TaggedImages, *, masks: bool) -> Table:
    """Score every row on the same images; the gap is measured on value-path features for all."""
    names = generator.classes.foreground
    settings = MaskConfig(confidence=0.0) if masks else None
    scores = {row.name: LocalisationScores(len(names) + 1, masks=settings) for row in rows}
    regions = RegionSums(len(names), generator.encoder.joint_width)
    for index in range(len(images)):
        sample = images[index]
        if not sample["labels"] or sample["mask"] is None:
            continue
        image, labels = sample["image"], [generator.check_labels(sample["labels"])]
        truth = torch.from_numpy(sample["mask"]).long()
        encoded = generator.encoder.encode(generator.encoder.resize(image)[None])
        regions.update(generator.encoder.dense(encoded, "value")[0], truth, encoded.grid)
        for row in rows:
            generator.prototypes, generator.scale = row.prototypes, row.scale
            (maps,) = generator.localise([image], encoded, labels)
            scores[row.name].update(image, maps, truth)
    table: Table = {}
    for row in rows:
        found = {kind: 100 * value for kind, value in scores[row.name].compute().items()}
        table[row.name] = {**found, "gap": gap_centroid(row.prototypes[: len(names)], *regions.compute())}
    return table


def summary(tables: Sequence[Table], against: Mapping[str, str] | None = None) -> str:
    """Lay out mean and deviation over the encoders, and in how many of them a row beats another, in Markdown.

    Args:
        tables: One an encoder.
        against: The row that a row is compared with; None compares all others with ``text``.
    """
    if against is None:
        against = dict.fromkeys(set(tables[0]) - {"text"}, "text")
    columns = [column for column in COLUMNS if column in next(iter(tables[0].values()))]
    lines = ["| prototypes | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in tables[0]:
        cells = []
        for column in columns:
            values = [table[name][column] for table in tables]
            digits = 2 if column == "gap" else 1
            cell = f"{mean(values):.{digits}f}"
            if len(values) > 1:
                cell += f" ± {stdev(values):.{digits}f}"
            if name in against:
                sign, other = -1 if column == "gap" else 1, against[name]
                wins = sum(sign * (table[name][column] - table[other][column]) > 0 for table in tables)
                cell += f" ({wins}/{len(values)})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def capped(preset: str, pixels: int) -> PrototypeRecipe:
    """Return a preset that takes at most so many patches of an image."""
    recipe = PrototypeRecipe.preset(preset)  # type: ignore[arg-type]
    return replace(recipe, targets=replace(recipe.targets, max_pixels_per_image=pixels))


def run(
    specs: Sequence[EncoderSpec],
    recipes: Mapping[str, PrototypeRecipe],
    data: SegmentationDataModule,
    splits: Sequence[str],
    *,
    masks: bool,
) -> dict[str, list[Table]]:
    """Learn and score with every encoder; one table an encoder for each split."""
    tables: dict[str, list[Table]] = {split: [] for split in splits}
    for number, spec in enumerate(specs):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            learnt = {
                name: fit(VisionPrototypeModule(encoder=spec, recipe=one), data, Path(folder) / name)
                for name, one in recipes.items()
            }
        module = learnt["ours"]
        text = module.generator.text_prototypes
        rows = [Row("text", text, module.text_scale), Row("text, ours", text, module.vision_scale)]
        rows += [Row(name, one.prototypes, one.vision_scale) for name, one in learnt.items()]
        print(f"encoder {number}: phase 1 done after {time.monotonic() - begun:.0f} s", flush=True)
        for split in splits:
            found = score(module.generator, rows, data.evaluation_dataset(split), masks=masks)
            tables[split].append(found)
            print(
                f"encoder {number}, {split}, {time.monotonic() - begun:.0f} s\n{summary([found])}", flush=True
            )
    return tables


def machine() -> dict[str, Any]:
    """Return what the numbers were computed with."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def parse(description: str, *, recipe: bool = False) -> argparse.Namespace:
    """Read the command line that the comparisons share.

    Args:
        description: Its first line is shown as help.
        recipe: Whether one preset is chosen.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("data", choices=["scenes", "photos"])
    parser.add_argument("--encoders", nargs="+", required=True, help="one file a training")
    parser.add_argument("--root", help="VOC2012 or VOCdevkit (photos)")
    parser.add_argument("--train", default="train_aug", help="list that phase 1 learns from (photos)")
    parser.add_argument("--pixels", type=int, default=120, help="patches an image that phase 1 learns from")
    parser.add_argument(
        "--score", nargs="+", help="lists or splits to score; default: val, or test of scenes"
    )
    parser.add_argument(
        "--no-masks", action="store_true", help="leave out the pseudo-masks, the slowest part"
    )
    if recipe:
        parser.add_argument("--recipe", choices=["default", "paper"], default="default")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    return parser.parse_args()


def sources(args: argparse.Namespace) -> tuple[SegmentationDataModule, list[EncoderSpec], list[str]]:
    """Return the data, the encoders and the splits to score that the arguments name."""
    if args.data == "photos":
        factory = "photo_clip:load_photo_clip"
        specs = [EncoderSpec(factory=factory, factory_options={"path": path}) for path in args.encoders]
        photos = VOCDataModule(args.root, classes=str(CLASSES), train_split=args.train)
        return photos, specs, args.score or ["val"]
    return (
        ShapesDataModule(),
        [EncoderSpec(checkpoint=path) for path in args.encoders],
        args.score or ["test"],
    )


def main() -> None:
    args = parse(__doc__ or "")
    data, specs, splits = sources(args)
    begun = time.monotonic()
    recipes = {name: capped(preset, args.pixels) for name, preset in RECIPES.items()}
    tables = run(specs, recipes, data, splits, masks=not args.no_masks)
    counts = {split: len(data.evaluation_dataset(split)) for split in splits}
    record = {
        "command": command(sys.argv),
        "machine": machine(),
        "seconds": round(time.monotonic() - begun),
        "training_images": len(data.localisation_dataset("train")),
        "scored_images": counts,
        "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
        "encoders": [Path(path).name for path in args.encoders],
        "scores": tables,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.data}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    text = f"`{record['command']}`\n" + "".join(
        f"\n{split}: {counts[split]} images, {len(specs)} trainings of the CLIP, mean ± deviation (how often "
        f"better than text)\n\n{summary(tables[split])}\n"
        for split in splits
    )
    (args.out / f"{args.data}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Score a list of configurations of phase 1 with several CLIPs: one row each, mean and deviation.

    python benchmarks/generators.py benchmarks/generators.yaml --encoders tiny0.safetensors ... --out tables
    python benchmarks/generators.py benchmarks/table4.yaml --encoders tiny0.safetensors ... --out tables

``generators.yaml`` sets text against vision prototypes in every generator, ``table4.yaml`` the prototype
sources of the paper's Table 4 against one another. An entry of such a list holds settings of
:class:`VisionPrototypeModule`, a name for its ``row``, and the row that it is measured ``against``. Phase 1
reads the tags of the training scenes; the scored scenes chose no setting.

``external`` is left out: the library carries no outside checkout, and the command that it brings is a
stand-in for tests, whose maps say nothing of any method.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from command_line import command
from jsonargparse import ArgumentParser
from prototypes import Row, Table, fit, machine, score, summary

from vpl_lightning.data import SegmentationDataModule, ShapesDataModule
from vpl_lightning.specs import EncoderSpec
from vpl_lightning.tasks import VisionPrototypeModule

ABOUT = ("row", "against")
"""Keys of an entry that are not settings."""
Entry = Mapping[str, Any]


def build(entry: Entry, encoder: EncoderSpec) -> VisionPrototypeModule:
    """Build what an entry configures, as the command line would."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VisionPrototypeModule, "model")
    settings = {key: value for key, value in entry.items() if key not in ABOUT}
    parsed = parser.parse_object({"model": {**settings, "encoder": vars(encoder)}})
    module: VisionPrototypeModule = parser.instantiate_classes(parsed).model
    return module


def run(
    entries: Sequence[Entry], encoder: EncoderSpec, data: SegmentationDataModule, split: str, *, masks: bool
) -> Table:
    """Fit and score every entry with one encoder."""
    table: Table = {}
    for entry in entries:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            module = fit(build(entry, encoder), data, Path(folder))
        row = Row(entry["row"], module.prototypes, module.vision_scale)
        table |= score(module.generator, [row], data.evaluation_dataset(split), masks=masks)
        print(f"{entry['row']}: {table[entry['row']]}, {time.monotonic() - begun:.0f} s", flush=True)
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, help="YAML list of configurations")
    parser.add_argument("--encoders", nargs="+", required=True, help="one file a training")
    parser.add_argument("--train-images", type=int, default=600)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--no-masks", action="store_true", help="leave out the pseudo-masks")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    entries = yaml.safe_load(args.rows.read_text(encoding="utf-8"))
    data = ShapesDataModule(train_images=args.train_images, test_images=args.test_images)
    begun = time.monotonic()
    tables = [
        run(entries, EncoderSpec(checkpoint=path), data, "test", masks=not args.no_masks)
        for path in args.encoders
    ]
    record = {
        "command": command(sys.argv),
        "machine": machine(),
        "seconds": round(time.monotonic() - begun),
        "training_images": args.train_images,
        "scored_images": args.test_images,
        "rows": entries,
        "encoders": [Path(path).name for path in args.encoders],
        "scores": tables,
    }
    against = {entry["row"]: entry["against"] for entry in entries if "against" in entry}
    text = (
        f"`{record['command']}`\n\n{args.test_images} drawn test scenes, phase 1 on {args.train_images}, "
        f"{len(tables)} trainings of the CLIP, mean ± deviation (how often better than the text row)\n\n"
        f"{summary(tables, against)}\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.rows.stem}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (args.out / f"{args.rows.stem}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

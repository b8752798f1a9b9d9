"""Time every stage and measure its peak memory; print one table and write JSON.

    python benchmarks/speed.py --out tables
    python benchmarks/speed.py --only masks --root VOC2012 --images 40 --out tables

Each section runs in a fresh process, whose peak resident memory is the section's. The model is a ViT-B/16 with random
weights: the arithmetic does not depend on them. Without ``--root`` the photographs are smooth noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from command_line import command

from vpl_lightning.cli.process import tune


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="sections: maps, step, store, masks, growth, refiners")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=40, help="photographs of the section masks")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of the section store")
    parser.add_argument("--root", help="VOC2012 or VOCdevkit with photographs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", help="folder for temporary files")
    parser.add_argument("--out", type=Path, help="folder of speed.md and speed.json")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_section(options: argparse.Namespace) -> dict[str, Any]:
    from cam_speed import peak_bytes
    from speed_sections import SECTIONS

    torch.set_num_threads(options.threads)
    rows = SECTIONS[options.section](options)
    return {"rows": [asdict(row) for row in rows], "peak_bytes": peak_bytes()}


def table(report: dict[str, Any]) -> str:
    lines = ["| section | case | seconds | ratio | to | kB written | note |", "|---|---|---|---|---|---|---|"]
    for name, section in report["sections"].items():
        for row in section["rows"]:
            cells = [
                name,
                row["case"],
                f"{row['seconds']:.3f}" if row["seconds"] else "",
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                row["floor"],
                "" if row["bytes_written"] is None else f"{row['bytes_written'] / 1e3:.1f}",
                row["note"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| {name} | peak memory | | | | | {section['peak_bytes'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def main() -> None:
    tune()  # as vpl does; OpenMP's part reaches the processes of the sections
    options = arguments()
    if options.section:
        print(json.dumps(run_section(options)))
        return
    words = [word for word in sys.argv[1:] if word != "--section"]
    names = options.only or ["maps", "step", "store", "masks", "growth", "refiners"]
    report: dict[str, Any] = {
        "command": command(sys.argv),
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {options.device}",
        "sections": {},
    }
    for name in names:
        section = [sys.executable, __file__, *words, "--section", name]
        done = subprocess.run(section, check=True, stdout=subprocess.PIPE, text=True)
        report["sections"][name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: done", file=sys.stderr, flush=True)
    text = f"`{report['command']}`\n\n{report['machine']}; medians of {options.rounds} rounds\n\n{table(report)}\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.out / "speed.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

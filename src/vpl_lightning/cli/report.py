"""What ``vpl prepare`` found, as lines for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from vpl_lightning.archives.verify import Fault
from vpl_lightning.artifacts import atomic_write

SHOWN_PER_KIND = 100
"""Faults of one kind that are printed; a report file holds all."""


@dataclass
class Findings:
    """Notes and faults of one run.

    Attributes:
        notes: What was read, made or left out.
        faults: What is wrong.
    """

    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print a line, and keep it for the report."""
        print(text, flush=True)
        self.notes.append(text)

    def conclude(self, what: str, *, images: int, report: str | None) -> int:
        """Print the faults by kind and write the report.

        Args:
            what: The data set, for the last line.
            images: How many were looked at.
            report: JSON file, or None.

        Returns:
            The exit code: 0 without faults, else 1.
        """
        self.faults.sort()
        for kind, group in groupby(self.faults, key=lambda fault: fault.kind):
            faults = list(group)
            print(f"{kind} ({len(faults)}):")
            for fault in faults[:SHOWN_PER_KIND]:
                print(f"  {fault.id}: {fault.detail}")
            if len(faults) > SHOWN_PER_KIND:
                print(f"  and {len(faults) - SHOWN_PER_KIND} more; --report FILE lists all")
        count = f"{len(self.faults):,} faults" if self.faults else "no fault"
        print(f"{what}: {count} in {images:,} images", flush=True)
        if report:
            content = {"images": images, "notes": self.notes, "faults": [f._asdict() for f in self.faults]}
            atomic_write(Path(report), (json.dumps(content, indent=1) + "\n").encode())
        return 1 if self.faults else 0

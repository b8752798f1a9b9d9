"""The work of ``vpl prepare coco``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vpl_lightning.archives import coco
from vpl_lightning.archives.lists import OFFICIAL_COCO_COUNTS
from vpl_lightning.archives.parallel import process_files
from vpl_lightning.archives.verify import Fault, ImageCheck, Rules, verify
from vpl_lightning.artifacts import atomic_write
from vpl_lightning.cli.report import Findings
from vpl_lightning.clip import ClassSet
from vpl_lightning.errors import ConfigurationError


@dataclass
class CocoPreparation:
    """Prepares the splits of one COCO.

    Attributes:
        root: Folder of the archives.
        target: Folder that gets masks and index.
        crowd: What becomes of crowds.
        order: Painting order.
        classes: Class set with COCO's category names.
        workers: Processes; None takes one a core.
        findings: What was found.
    """

    root: Path
    target: Path
    crowd: coco.Crowd
    order: coco.Order
    classes: ClassSet
    workers: int | None
    findings: Findings = field(default_factory=Findings)

    def find(self, splits: Sequence[str]) -> None:
        """Look for every JSON before the first is read.

        Raises:
            ConfigurationError: If one is nowhere; says where it looked.
        """
        if not self.root.is_dir():
            raise ConfigurationError(f"root='{self.root}' is no folder; give the one with COCO's archives")
        for split in splits:
            coco.annotation_file(self.root, split)

    def prepare(self, split: str, *, verify: bool) -> int:
        """Index a split, paint its masks, look for its files; return how many images it has."""
        file = coco.annotation_file(self.root, split)
        print(f"{split}: reading {file}", flush=True)
        catalogue = coco.COCOCatalogue(file, self.classes.foreground)
        images = [image for image in catalogue.images if catalogue.labels(image)]
        self._compare_counts(split, len(catalogue.images), len(images))
        policy = coco.PaintingPolicy(self.crowd, self.order, coco.file_hash(file))
        broken = self._paint(split, catalogue, images, policy)
        self._index(split, catalogue, images, policy)
        return self._check(split, images, broken, deep=verify)

    def _compare_counts(self, split: str, found: int, labelled: int) -> None:
        official = OFFICIAL_COCO_COUNTS.get(split)
        counts = f"{split}: {labelled:,} of {found:,} images show an object; the others are left out"
        if official and found < official[0]:
            counts += f"; a subset of the official {official[0]:,}"
        self.findings.note(counts)
        if official and (found > official[0] or (found == official[0] and labelled != official[1])):
            expected = f"officially {official[1]:,} of {official[0]:,}"
            detail = f"{labelled:,} labelled of {found:,} images, {expected}"
            self.findings.faults.append(Fault("wrong count", split, detail))

    def _paint(
        self,
        split: str,
        catalogue: coco.COCOCatalogue,
        images: Sequence[Mapping[str, Any]],
        policy: coco.PaintingPolicy,
    ) -> set[str]:
        folder = self.target / coco.MASK_FOLDER / split
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"output: {folder} cannot be made ({error.strerror}); give --output a folder that can be "
                "written"
            ) from error
        jobs = coco.painting_jobs(catalogue, images, folder, policy)
        title = f"{split}: painting masks"
        results = process_files(coco.paint_mask, jobs, total=len(images), title=title, workers=self.workers)
        faults = [
            Fault("annotation unreadable", _id(image), message)
            for image, message in zip(images, results, strict=True)
            if message
        ]
        self.findings.faults += faults
        return {fault.id for fault in faults}

    def _index(
        self,
        split: str,
        catalogue: coco.COCOCatalogue,
        images: Sequence[Mapping[str, Any]],
        policy: coco.PaintingPolicy,
    ) -> None:
        from vpl_lightning.data.index import Entry, TaggedIndex

        folder = self.target / coco.INDEX_FOLDER
        entries = (Entry(_id(image), str(image["file_name"]), catalogue.labels(image)) for image in images)
        TaggedIndex.of(entries).save(folder / split)
        content = {**asdict(policy), "classes": list(self.classes.foreground), "images": len(images)}
        atomic_write(folder / f"{split}.json", (json.dumps(content, indent=1) + "\n").encode())

    def _check(self, split: str, images: Sequence[Mapping[str, Any]], broken: set[str], *, deep: bool) -> int:
        folder = coco.coco_images(self.root, split, str(images[0]["file_name"])) if images else self.root
        masks = self.target / coco.MASK_FOLDER / split
        checks = (
            ImageCheck(
                id=_id(image),
                image=folder / str(image["file_name"]),
                size=(int(image["height"]), int(image["width"])),
                mask=None if _id(image) in broken else masks / f"{_id(image)}.png",
            )
            for image in images
        )
        rules = Rules(frozenset(self.classes.foreground), self.classes.num_classes, deep=deep)
        self.findings.faults += verify(checks, rules, total=len(images), workers=self.workers)
        return len(images)


def _id(image: Mapping[str, Any]) -> str:
    return Path(str(image["file_name"])).stem

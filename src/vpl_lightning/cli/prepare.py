"""``vpl prepare``: from the official archives, or a folder of photographs, to what the data modules read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpl_lightning.archives import voc
from vpl_lightning.archives.coco import Crowd, Order
from vpl_lightning.archives.lists import OFFICIAL_VOC_COUNTS, official_voc_ids, read_ids
from vpl_lightning.archives.parallel import process_files
from vpl_lightning.archives.verify import Fault, ImageCheck, Rules
from vpl_lightning.archives.verify import verify as verify_images
from vpl_lightning.artifacts import atomic_write
from vpl_lightning.cli.report import Findings
from vpl_lightning.clip import class_set
from vpl_lightning.errors import ConfigurationError


def prepare_voc(
    root: str,
    *,
    sbd: str | None = None,
    output: str | None = None,
    verify: bool = False,
    official: bool = True,
    classes: str = "voc",
    workers: int | None = None,
    report: str | None = None,
) -> int:
    """Make VOC 2012 ready: derive ``train_aug``, make ``SegmentationClassAug``, check lists and files.

    Nothing that exists is overwritten. Lists that are proper subsets of the official ones are accepted and
    named.

    Args:
        root: ``VOC2012`` or ``VOCdevkit``, unpacked from the official archives.
        sbd: ``benchmark_RELEASE`` of the SBD archive, from which ``train_aug`` and its masks come.
        output: Where lists and masks go, for a root that is read-only (data.prepared in configurations).
        verify: Open every file once and say what is wrong with it.
        official: Compare the lists with the official ones (1,464, 1,449, 10,582 and 1,456 images).
        classes: Class set whose names the annotations use.
        workers: Processes; one a core by default.
        report: JSON file that gets every finding.

    Returns:
        0 if nothing is wrong, else 1.

    Raises:
        ConfigurationError: If a folder is not what it should be; says where it looked.
    """
    base = voc.voc_root(root)
    target = Path(output) if output else base
    findings = Findings()
    splits = _voc_lists(base, target, None if sbd is None else voc.sbd_root(sbd), findings)
    if official:
        _compare_lists(splits, findings)
    masked = sorted({name for split, ids in splits.items() if split != "test" for name in ids})
    folder, broken = base / voc.OWN, set[str]()
    if "train_aug" in splits:
        folder = target / voc.AUGMENTED
        jobs = voc.mask_jobs(masked, base, target, None if sbd is None else voc.sbd_root(sbd))
        broken = _make_masks(jobs, findings, workers=workers)
    names = class_set(classes)
    checks = [
        ImageCheck(
            id=name,
            image=base / "JPEGImages" / f"{name}.jpg",
            annotation=base / "Annotations" / f"{name}.xml",
            mask=None if name in broken else folder / f"{name}.png",
        )
        for name in masked
    ]
    known = set(masked)
    checks += [
        ImageCheck(id=name, image=base / "JPEGImages" / f"{name}.jpg")
        for name in splits.get("test", [])
        if name not in known
    ]
    rules = Rules(frozenset(names.foreground), names.num_classes, deep=verify)
    findings.faults += verify_images(checks, rules, total=len(checks), workers=workers)
    return findings.conclude(f"VOC 2012 in {base}", images=len(checks), report=report)


def prepare_coco(
    root: str,
    *,
    output: str | None = None,
    splits: Sequence[str] = ("train2014", "val2014"),
    crowd: Crowd = "ignore255",
    order: Order = "file",
    verify: bool = False,
    classes: str = "coco",
    workers: int | None = None,
    report: str | None = None,
) -> int:
    """Make COCO ready: paint semantic masks, index the labelled images, check counts and files.

    Masks that were painted with the same policy from the same annotations are kept, others painted again.
    Labels are the categories of objects that are no crowds; images without any are left out (82,081 and
    40,137 remain).

    Args:
        root: Folder of the unpacked archives: images and ``annotations/instances_*.json``.
        output: Where masks and the index go, for a root that is read-only (data.prepared in configurations).
        splits: Splits to prepare.
        crowd: Crowds become void (255), in their turn of the painting order, or are not painted.
        order: Paint as in the file, or large objects first, so that small ones stay visible.
        verify: Open every file once and say what is wrong with it.
        classes: Class set with COCO's category names.
        workers: Processes; one a core by default.
        report: JSON file that gets every finding.

    Returns:
        0 if nothing is wrong, else 1.

    Raises:
        ConfigurationError: If a folder is not what it should be; says where it looked.
        DataError: If a JSON is not COCO's.
    """
    from vpl_lightning.cli.prepare_coco import CocoPreparation

    preparation = CocoPreparation(Path(root), Path(output or root), crowd, order, class_set(classes), workers)
    preparation.find(splits)
    images = sum(preparation.prepare(split, verify=verify) for split in splits)
    return preparation.findings.conclude(f"COCO in {root}", images=images, report=report)


def prepare_folder(
    root: str,
    *,
    tags: str,
    classes: str,
    masks: str | None = None,
    verify: bool = False,
    workers: int | None = None,
    report: str | None = None,
) -> int:
    """Check a folder of photographs and its tags. Nothing is written: ``vpl fit`` reads them as they are.

    Args:
        root: Folder of photographs, sub-folders included.
        tags: CSV or JSON file of tags.
        classes: YAML file with class names, or the name of a shipped class set.
        masks: Folder with ``<id>.png`` for scoring; photographs without one are not scored.
        verify: Open every file once and say what is wrong with it.
        workers: Processes; one a core by default.
        report: JSON file that gets every finding.

    Returns:
        0 if nothing is wrong, else 1.

    Raises:
        ConfigurationError: If a path does not exist or the tags have another format; names it.
    """
    from vpl_lightning.data.folder import FolderFiles
    from vpl_lightning.data.tags import TagResolver, read_tag_rows

    if not Path(root).is_dir():
        raise ConfigurationError(f"root='{root}' is no folder; give the one with the photographs")
    if masks and not Path(masks).is_dir():
        raise ConfigurationError(f"masks='{masks}' is no folder; give the one with <id>.png")
    names = class_set(classes)
    resolver, files, findings = TagResolver(names), FolderFiles(Path(root)), Findings()
    rows = read_tag_rows(Path(tags))
    drawn = {path.stem: path for path in Path(masks).glob("*.png")} if masks else {}
    checks, tagged, owners, known = list[ImageCheck](), set[str](), dict[str, str](), set[str]()
    shown: Counter[str] = Counter()
    for row in rows:
        file = files.find(row.file) or row.file
        name = Path(file).stem
        known.update(tag for tag in row.tags if resolver.find(tag) is not None)
        shown.update(names.foreground[number] for number in resolver.resolve(row.tags)[0])
        checks.append(
            ImageCheck(name, Path(root) / file, tags=tuple(row.tags), mask=drawn.get(name), upright=True)
        )
        if file in tagged:
            findings.faults.append(Fault("image tagged twice", name, f"{tags}: {row.file}"))
        elif owners.setdefault(name, file) != file:
            detail = f"{owners[name]} and {file}: rename one, since masks are named by id"
            findings.faults.append(Fault("id used twice", name, detail))
        tagged.add(file)
    findings.faults += [
        Fault("image without tags", Path(file).stem, f"{tags} has no row for {file}")
        for file in files.files
        if file not in tagged
    ]
    findings.faults += [
        Fault("mask without image", name, f"{path}; {tags} has no row of that name")
        for name, path in drawn.items()
        if name not in owners
    ]
    findings.note(f"{len(rows):,} rows, {len(files.files):,} photographs")
    findings.note("tags: " + ", ".join(f"{name} {shown[name]:,}" for name in names.foreground))
    strange = {tag for row in rows for tag in row.tags} - known
    for tag in sorted(strange):
        findings.note(resolver.explain(tag))
    rules = Rules(frozenset(known), names.num_classes, deep=verify)
    findings.faults += verify_images(checks, rules, total=len(checks), workers=workers)
    return findings.conclude(f"photographs in {root}", images=len(checks), report=report)


def _voc_lists(base: Path, target: Path, sbd: Path | None, findings: Findings) -> dict[str, list[str]]:
    """Read the lists that are there, and derive ``train_aug`` if it is not."""
    splits = {}
    for split in OFFICIAL_VOC_COUNTS:
        for folder in (target / voc.LISTS, base / voc.LISTS):
            if split not in splits and (folder / f"{split}.txt").is_file():
                splits[split] = read_ids(folder / f"{split}.txt")
    for split in ("train", "val"):
        if split not in splits:
            raise ConfigurationError(
                f"root: {base / voc.LISTS} has no {split}.txt; unpack VOCtrainval_11-May-2012.tar there"
            )
    if "train_aug" not in splits and sbd is not None:
        splits["train_aug"] = voc.derive_train_aug(splits["train"], splits["val"], sbd)
        file = target / voc.LISTS / "train_aug.txt"
        _write(file, "\n".join(splits["train_aug"]) + "\n")
        findings.note(f"train_aug: derived from SBD into {file}")
    if "train_aug" not in splits:
        findings.note("train_aug: no list; give --sbd to derive it, or train on 'train' (1,464 images)")
    if "test" not in splits:
        findings.note("test: no list; its archive is needed only to predict for the test server")
    return splits


def _compare_lists(splits: Mapping[str, Sequence[str]], findings: Findings) -> None:
    """Compare lists with the official ones, id by id."""
    for split, ids in splits.items():
        official = set(official_voc_ids(split))
        foreign = [name for name in ids if name not in official]
        lacking = sorted(official.difference(ids))
        count = f"{split}: {len(ids):,} of {len(official):,} official images"
        findings.note(f"{count}; a subset, {lacking[0]} is the first that it lacks" if lacking else count)
        findings.faults += [
            Fault("id not in the official list", name, f"{split}; --official false accepts other lists")
            for name in foreign
        ]


def _make_masks(jobs: Sequence[voc.MaskJob], findings: Findings, *, workers: int | None) -> set[str]:
    """Make masks, and return the ids of those whose source is broken."""
    if not jobs:
        return set()
    _make_folder(jobs[0].target.parent)
    results = process_files(voc.make_mask, jobs, total=len(jobs), title="making masks", workers=workers)
    faults = [
        Fault("mask source unreadable", job.target.stem, message)
        for job, message in zip(jobs, results, strict=True)
        if message
    ]
    findings.faults += faults
    findings.note(f"masks: made {len(jobs) - len(faults):,} in {jobs[0].target.parent}")
    return {fault.id for fault in faults}


def _write(path: Path, text: str) -> None:
    _make_folder(path.parent)
    atomic_write(path, text.encode())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"output: {folder} cannot be made ({error.strerror}); give --output a folder that can be written"
        ) from error

"""Anyone's photographs: a folder and a file of tags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from vpl_lightning.clip import ClassSet
from vpl_lightning.data.base import SegmentationDataModule
from vpl_lightning.data.checks import OnBadImage, announce, named
from vpl_lightning.data.images import ImageFolder, MaskFolder
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.data.listing import image_files
from vpl_lightning.data.tags import TagResolver, TagRow, read_tag_rows
from vpl_lightning.data.transforms import Augmentation
from vpl_lightning.errors import ConfigurationError

SPLITS = ("train", "val", "test", "all")


class TaggedFolderDataModule(SegmentationDataModule):
    """A folder of photographs with tags, and optionally masks for scoring.

    Photographs are turned as their EXIF orientation says, as people see them; masks and predictions fit the
    turned ones. ``train`` holds the rows whose ``split`` is ``train`` or empty. ``val`` and ``test`` hold the
    rows of that name or, if there are none, the photographs that have a mask.

    Args:
        root: Folder of photographs, sub-folders included.
        tags: CSV or JSON file (:func:`vpl_lightning.data.tags.read_tag_rows`).
        classes: YAML file with names, synonyms and background words, or the name of a shipped class set.
        masks: Folder with ``<id>.png`` for scoring, where ``id`` is the file name without suffix.
        unknown_tags: ``raise`` on a tag that is no class or synonym, or ``ignore`` such tags and print them.
        predict: ``all``, another split, an image file, or a folder of images.
        batch_size: Training views a process.
        num_workers: Worker processes of a loader.
        crop_size: Side of the training views in pixels.
        on_bad_image: See :class:`SegmentationDataModule`.
        augmentation: What training views vary.
        train_masks: None, a folder of masks for phase 2, or ``truth``.
        seed: Orders and views of training.

    Raises:
        ConfigurationError: If a path does not exist; names the argument.
    """

    def __init__(
        self,
        root: str,
        tags: str,
        classes: ClassSet | str,
        *,
        masks: str | None = None,
        unknown_tags: Literal["raise", "ignore"] = "raise",
        predict: str = "all",
        batch_size: int = 4,
        num_workers: int = 0,
        crop_size: int = 320,
        on_bad_image: OnBadImage = "raise",
        augmentation: Augmentation | None = None,
        train_masks: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes=classes,
            splits={},
            predict=predict,
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            on_bad_image=on_bad_image,
            augmentation=augmentation,
            seed=seed,
        )
        for key, value in (("root", root), ("masks", masks)):
            if value is not None and not Path(value).is_dir():
                raise ConfigurationError(f"data.{key}='{value}' is no folder; give one that exists")
        if not Path(tags).is_file():
            raise ConfigurationError(f"data.tags='{tags}' does not exist; give a CSV or JSON file of tags")
        self.root = Path(root)
        self.tags = Path(tags)
        self.masks = None if masks is None else Path(masks)
        self.unknown_tags = unknown_tags
        self._rows: list[tuple[Entry, str]] | None = None
        self.choose_training_masks(train_masks)

    def read_index(self, split: str, *, labelled: bool) -> TaggedIndex:
        """Select the rows of a split."""
        del labelled
        if split not in SPLITS:
            raise ConfigurationError(f"unknown split '{split}'; choose from {', '.join(SPLITS)}")
        rows = self._read_rows()
        if split == "all":
            return TaggedIndex.of(entry for entry, _ in rows)
        chosen = [entry for entry, name in rows if name == split or (split == "train" and not name)]
        if not chosen and split != "train":
            chosen = [entry for entry, _ in rows if self._mask_of(entry)]
        return TaggedIndex.of(chosen)

    def image_source(self, split: str) -> ImageFolder:
        """Return the folder of photographs."""
        del split
        return ImageFolder(self.root, upright=True)

    def mask_source(self, split: str) -> MaskFolder | None:
        """Return the folder of masks, if there is one."""
        del split
        if self.masks is None:
            return None
        return MaskFolder(self.masks, self.num_classes, fix="draw it, or give the row another split")

    def _mask_of(self, entry: Entry) -> bool:
        return self.masks is not None and (self.masks / f"{entry.id}.png").is_file()

    def _read_rows(self) -> list[tuple[Entry, str]]:
        if self._rows is None:
            self._rows = self._match(read_tag_rows(self.tags))
        return self._rows

    def _match(self, rows: list[TagRow]) -> list[tuple[Entry, str]]:
        """Match tags to files and classes; complain of everything at once."""
        files = FolderFiles(self.root)
        resolver = TagResolver(self.classes)
        matched, missing, unknown, wrong = [], [], {}, []
        for row in rows:
            file = files.find(row.file)
            labels, strange = resolver.resolve(row.tags)
            unknown.update({tag: row.file for tag in strange if tag not in unknown})
            if row.split not in ("", *SPLITS[:3]):
                wrong.append(f"{row.file}: split '{row.split}'")
            elif file is None:
                missing.append(row.file)
            else:
                matched.append((Entry(Path(file).stem, file, labels), row.split))
        if wrong:
            raise ConfigurationError(
                f"{self.tags}: {len(wrong)} rows have a wrong split: {named(wrong)}; a split is one of "
                f"{', '.join(SPLITS[:3])}"
            )
        if missing:
            raise ConfigurationError(
                f"{self.tags} names {len(missing)} files that are not in {self.root}: {named(missing)}; "
                "restore them or remove their rows"
            )
        if repeated := repeated_ids(entry for entry, _ in matched):
            raise ConfigurationError(
                f"{self.tags}: {len(repeated)} rows repeat a name: {named(repeated)}; keep one row a "
                "photograph, and rename photographs that differ in folder or suffix alone, since masks are "
                "named by the rest"
            )
        self._judge_unknown(unknown, resolver)
        return matched

    def _judge_unknown(self, unknown: dict[str, str], resolver: TagResolver) -> None:
        if not unknown:
            return
        if self.unknown_tags == "ignore":
            announce(f"{self.tags}: ignoring {len(unknown)} unknown tags: {named(sorted(unknown))}")
            return
        lines = [f"  {file}: {resolver.explain(tag)}" for tag, file in sorted(unknown.items())]
        raise ConfigurationError(
            f"{self.tags}: {len(unknown)} unknown tags; add them to 'foreground' or 'synonyms' of the "
            "classes file, or set "
            "unknown_tags to ignore:\n" + "\n".join(lines)
        )


def repeated_ids(entries: Iterable[Entry]) -> list[str]:
    """Return the files whose id an earlier entry has, each with that entry's file."""
    first: dict[str, str] = {}
    repeated = []
    for entry in entries:
        if entry.id in first:
            repeated.append(f"{entry.file} (after {first[entry.id]})")
        else:
            first[entry.id] = entry.file
    return repeated


class FolderFiles:
    """The images below a folder, found by path, by name, or by name without suffix.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.files = image_files(root)
        self._paths = frozenset(self.files)
        self._by_name: dict[str, list[str]] = {}
        for file in self.files:
            path = Path(file)
            for key in dict.fromkeys((path.name, path.stem)):
                self._by_name.setdefault(key, []).append(file)

    def find(self, name: str) -> str | None:
        """Return the path of an image below the folder, or None.

        Raises:
            ConfigurationError: If several images fit; names them.
        """
        path = name.replace("\\", "/").removeprefix("./")
        found = [path] if path in self._paths else self._by_name.get(path, [])
        if len(found) > 1:
            raise ConfigurationError(
                f"'{name}' fits several images: {named(found)}; write the path below the folder"
            )
        return found[0] if found else None

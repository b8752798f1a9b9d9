"""Image-level tags from files: CSV, JSON, plain lists of ids and numbers, one-hot arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vpl_lightning.archives.lists import first_repeated
from vpl_lightning.clip import ClassSet
from vpl_lightning.errors import ConfigurationError, DataError

FILE_KEYS = ("file", "image", "filename", "path", "id")
"""Columns of a CSV and keys of a JSON record that name the image; the first that is there counts."""
TAG_KEYS = ("tags", "labels", "image_labels", "classes")
"""Columns and keys that hold the tags."""
SPLIT_KEY = "split"
"""Optional column or key: ``train``, ``val``, ``test``."""
SEPARATORS = ";|,"
"""What may stand between the tags of one cell."""


@dataclass(frozen=True)
class TagRow:
    """One line of a file of tags.

    Attributes:
        file: The image as the file names it.
        tags: Its tags as written.
        split: Its split, or empty.
    """

    file: str
    tags: list[str] = field(default_factory=list)
    split: str = ""


class TagResolver:
    """Turns tags into class ids: names and synonyms of a class set, whatever their case and separators.

    A class's synonyms are the comma-separated parts of its prompt ("person with clothes,people,human").

    Args:
        classes: The class set.
    """

    def __init__(self, classes: ClassSet) -> None:
        self.classes = classes
        self._ids: dict[str, int] = {}
        for number, prompt in enumerate(classes.prompts):
            for word in prompt.split(","):
                self._ids.setdefault(_plain(word), number)
        self._ids.update({_plain(name): number for number, name in enumerate(classes.foreground)})

    def find(self, tag: str) -> int | None:
        """Return the 0-based id of a tag, or None if the class set does not know it."""
        return self._ids.get(_plain(tag))

    def resolve(self, tags: Iterable[str]) -> tuple[list[int], list[str]]:
        """Return the ids of tags, each once, in order of first appearance, and the tags that are unknown."""
        ids: dict[int, None] = {}
        unknown = []
        for tag in tags:
            number = self.find(tag)
            if number is None:
                unknown.append(tag)
            else:
                ids[number] = None
        return list(ids), unknown

    def explain(self, tag: str) -> str:
        """Say which class an unknown tag may have meant."""
        close = get_close_matches(_plain(tag), self._ids, n=1)
        hint = f"; did you mean '{self.classes.foreground[self._ids[close[0]]]}'?" if close else ""
        return f"'{tag}' is no class or synonym of the class set '{self.classes.name}'{hint}"


def read_tag_rows(path: Path) -> list[TagRow]:
    """Read a CSV or JSON file of tags.

    CSV: a header with ``file`` and ``tags`` (or one of :data:`FILE_KEYS` and :data:`TAG_KEYS`), optionally
    ``split``; tags of one cell are separated by ``;``, ``|`` or ``,``. JSON: a mapping of files to lists of
    tags, or a list of records with the same keys.

    Raises:
        ConfigurationError: If the file is neither, or a column or row is wrong; names it.
        DataError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"data.tags='{path}' does not exist; give a CSV or JSON file of tags"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    if path.suffix.lower() == ".json":
        return _json_rows(text, path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv_rows(text, path)
    raise ConfigurationError(f"data.tags='{path}': the suffix must be .csv, .tsv or .json")


def read_label_file(path: Path, classes: ClassSet) -> dict[str, list[int]]:
    """Read image-level labels by id.

    Args:
        path: ``.txt`` with an id and its 0-based class ids a line (CLIP-ES's COCO lists); ``.npz`` with
            ``ids`` and a 0/1 matrix ``labels``; ``.csv`` or ``.json`` with tags by name.
        classes: The class set.

    Raises:
        ConfigurationError: If the file does not exist or its format is unknown.
        DataError: If a line is wrong or names an unknown class; names it.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"labels='{path}' does not exist; give a file, or xml, xml_no_difficult or mask"
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = _lines(path)
        _refuse_repeated([line.split()[0] for line in lines], path)
        return {line.split()[0]: _numbers(line, path, classes) for line in lines}
    if suffix == ".npz":
        return _one_hot(path, classes)
    if suffix in (".csv", ".tsv", ".json"):
        resolver, rows, labels = TagResolver(classes), read_tag_rows(path), {}
        _refuse_repeated([Path(row.file).stem for row in rows], path)
        for row in rows:
            ids, unknown = resolver.resolve(row.tags)
            if unknown:
                raise DataError(f"{path}: {row.file}: {resolver.explain(unknown[0])}")
            labels[Path(row.file).stem] = ids
        return labels
    raise ConfigurationError(
        f"labels='{path}': unknown format; give .txt, .npz, .csv or .json. A pickled .npy is not read, since "
        "reading it can run code: save its ids and matrix with numpy.savez(ids=..., labels=...)"
    )


def _csv_rows(text: str, path: Path) -> list[TagRow]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = header
    file_key, tag_key = _keys(header, path)
    rows = []
    for record in reader:
        if record.get(None):
            raise ConfigurationError(
                f"{path}, line {reader.line_num}: {len(record[None])} cells too many; put several tags into "
                "one cell, separated by ';'"
            )
        rows.append(_row(record, file_key, tag_key, f"{path}, line {reader.line_num}"))
    return rows


def _json_rows(text: str, path: Path) -> list[TagRow]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := first_repeated([key for key, _ in pairs]):
            raise ConfigurationError(f"{path}: '{twice}' comes twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if isinstance(value, Mapping):
        value = [{"file": file, "tags": tags} for file, tags in value.items()]
    if not isinstance(value, list) or not all(isinstance(record, Mapping) for record in value):
        raise ConfigurationError(f"{path}: write a mapping of files to lists of tags, or a list of records")
    rows = []
    for number, record in enumerate(value):
        file_key, tag_key = _keys(record, path)
        rows.append(_row(record, file_key, tag_key, f"{path}, record {number}"))
    return rows


def _row(record: Mapping[Any, Any], file_key: str, tag_key: str, where: str) -> TagRow:
    file, tags = record[file_key], record[tag_key] or []
    if isinstance(tags, str):
        for separator in SEPARATORS[1:]:
            tags = tags.replace(separator, SEPARATORS[0])
        tags = tags.split(SEPARATORS[0])
    if not isinstance(file, str) or not file.strip() or not isinstance(tags, list):
        raise ConfigurationError(
            f"{where}: needs the name of an image and a list of tags, found {file!r} and {tags!r}"
        )
    names = [str(tag).strip() for tag in tags]
    return TagRow(file.strip(), [name for name in names if name], str(record.get(SPLIT_KEY) or "").strip())


def _keys(names: Iterable[str], path: Path) -> tuple[str, str]:
    known = set(names)
    file_key = next((key for key in FILE_KEYS if key in known), None)
    tag_key = next((key for key in TAG_KEYS if key in known), None)
    if file_key is None or tag_key is None:
        raise ConfigurationError(
            f"{path} needs a column 'file' and a column 'tags', with a header; found: "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return file_key, tag_key


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _numbers(line: str, path: Path, classes: ClassSet) -> list[int]:
    words = line.split()[1:]
    count = len(classes.foreground)
    if not all(word.isdigit() and int(word) < count for word in words):
        raise DataError(
            f"{path}: '{line}': after the id come 0-based class ids below {count} ('{classes.name}')"
        )
    return [int(word) for word in words]


def _one_hot(path: Path, classes: ClassSet) -> dict[str, list[int]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, matrix = arrays["ids"].astype(str), arrays["labels"]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read as arrays 'ids' and 'labels': {error}") from error
    if matrix.shape != (len(ids), len(classes.foreground)):
        raise DataError(
            f"{path}: labels has shape {matrix.shape}; {len(ids)} ids and {len(classes.foreground)} classes "
            f"of '{classes.name}' need {(len(ids), len(classes.foreground))}"
        )
    if not np.isin(matrix, (0, 1)).all():
        raise DataError(f"{path}: labels must be 0 or 1; round scores first")
    _refuse_repeated(ids.tolist(), path)
    return {
        str(name): [int(tag) for tag in np.flatnonzero(row)] for name, row in zip(ids, matrix, strict=True)
    }


def _refuse_repeated(ids: list[str], path: Path) -> None:
    if twice := first_repeated(ids):
        raise DataError(f"{path}: '{twice}' comes twice; keep one")


def _plain(tag: str) -> str:
    return " ".join(tag.lower().replace("_", " ").replace("-", " ").split())

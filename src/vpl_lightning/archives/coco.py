"""COCO: semantic masks and image-level labels from the instances JSON, with a recorded policy."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8

from vpl_lightning.artifacts import fingerprint, mask_fingerprint, write_mask
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.labels import VOID

ANNOTATION_LAYOUTS = ("annotations/instances_{split}.json", "instances_{split}.json", "instances_{role}.json")
"""Where the JSON of a split is."""
INDEX_FOLDER = "vpl_index"
"""Folder of the arrays with ids, files and tags."""
MASK_FOLDER = "SegmentationClass"
IMAGE_LAYOUTS = (
    "{split}",
    "images/{split}",
    "JPEGImages/{split}",
    "JPEGImages/{role}",
    "images/{role}",
    "{role}",
)
"""Where images of a split are: the official archives, then what other code bases use (CLIP-ES, SeCo, "
"WeCLIP)."""
MASK_LAYOUTS = (MASK_FOLDER + "/{split}", MASK_FOLDER + "/{role}", MASK_FOLDER)
"""Where masks of a split are, likewise."""
IMAGE_KEYS = ("file_name", "height", "width")
ANNOTATION_KEYS = ("image_id", "category_id", "iscrowd", "area", "segmentation")
HASH_CHUNK = 1 << 20
"""Bytes hashed at a time."""

Crowd = Literal["ignore255", "skip"]
"""What becomes of regions annotated as crowds: void, or nothing (as in LPCAM's and CLIP-ES's masks)."""
Order = Literal["file", "area_desc"]
"""Painting order where objects overlap: as in the file (CLIP-ES's masks), or large ones first, so that small
ones stay visible."""


@dataclass(frozen=True)
class PaintingPolicy:
    """How instances become a label map; kept in every mask and beside the index.

    Attributes:
        crowd: See :data:`Crowd`. Crowds are painted in their turn, like objects.
        order: See :data:`Order`.
        annotations: SHA-256 of the JSON.
    """

    crowd: Crowd
    order: Order
    annotations: str


@dataclass(frozen=True)
class Instance:
    """One annotation.

    Attributes:
        value: What it paints: class id + 1, or void for a crowd.
        area: Its area in pixels as annotated.
        segmentation: Polygons, or run lengths, compressed or not.
    """

    value: int
    area: float
    segmentation: Any


@dataclass(frozen=True)
class PaintingJob:
    """One mask to paint.

    Attributes:
        target: Palette PNG.
        size: ``(H, W)``.
        instances: In painting order.
        fingerprint: Of the policy; a mask that has it is kept.
    """

    target: Path
    size: tuple[int, int]
    instances: tuple[Instance, ...]
    fingerprint: str


class COCOCatalogue:
    """The instances JSON of a split, read with ``pycocotools``.

    Args:
        path: The JSON.
        names: Class names of the class set; ids follow their order, and the JSON's categories are matched by
            name.

    Raises:
        DataError: If the file is not COCO's, or has a category that the class set lacks; names it.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        from pycocotools.coco import COCO

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._coco = COCO(str(path))
            categories = {int(item["id"]): str(item["name"]) for item in self._coco.dataset["categories"]}
            self.images = sorted(self._coco.imgs.values(), key=lambda image: int(image["id"]))
            self._check(categories)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path} is not COCO's instances JSON: {error!r}; unpack it again") from error
        self.path = path
        unknown = sorted(set(categories.values()) - set(names))
        if unknown:
            raise DataError(
                f"{path} has the categories {', '.join(unknown)}, which the class set lacks; name its "
                "classes as COCO does"
            )
        self.class_ids = {number: names.index(name) for number, name in categories.items()}

    def _check(self, categories: Mapping[int, str]) -> None:
        """Look for what every image and annotation must have.

        Raises:
            ValueError: Naming the first that lacks it.
        """
        records = {
            "image": (self.images, IMAGE_KEYS),
            "annotation": (self._coco.anns.values(), ANNOTATION_KEYS),
        }
        for kind, (items, keys) in records.items():
            for item in items:
                if lacking := [key for key in keys if key not in item]:
                    raise ValueError(f"{kind} {item['id']} lacks {', '.join(lacking)}")
        for item in self._coco.anns.values():
            for key, known in (("category_id", categories), ("image_id", self._coco.imgs)):
                if item[key] not in known:
                    raise ValueError(f"annotation {item['id']} has the unknown {key} {item[key]}")

    def labels(self, image: Mapping[str, Any]) -> list[int]:
        """Return the 0-based classes of an image's objects, ascending; crowds do not count as objects."""
        found = {
            self.class_ids[int(item["category_id"])]
            for item in self._annotations(image)
            if not item["iscrowd"]
        }
        return sorted(found)

    def instances(self, image: Mapping[str, Any], policy: PaintingPolicy) -> tuple[Instance, ...]:
        """Return what is painted, in order."""
        painted = [
            Instance(
                VOID if item["iscrowd"] else self.class_ids[int(item["category_id"])] + 1,
                float(item["area"]),
                item["segmentation"],
            )
            for item in self._annotations(image)
            if not (item["iscrowd"] and policy.crowd == "skip")
        ]
        if policy.order == "area_desc":
            painted.sort(key=lambda instance: -instance.area)
        return tuple(painted)

    def _annotations(self, image: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return an image's annotations in the order of the file."""
        return list(self._coco.imgToAnns.get(image["id"], []))


def painting_jobs(
    catalogue: COCOCatalogue, images: Sequence[Mapping[str, Any]], folder: Path, policy: PaintingPolicy
) -> Iterator[PaintingJob]:
    """Plan the masks of images."""
    mark = fingerprint(asdict(policy))
    for image in images:
        yield PaintingJob(
            target=folder / f"{Path(str(image['file_name'])).stem}.png",
            size=(int(image["height"]), int(image["width"])),
            instances=catalogue.instances(image, policy),
            fingerprint=mark,
        )


def paint_mask(job: PaintingJob) -> str | None:
    """Paint and write one mask, unless it is there; return what is wrong with its annotations."""
    if mask_fingerprint(job.target) == job.fingerprint:
        return None
    mask = np.zeros(job.size, np.uint8)
    for instance in job.instances:
        try:
            mask[instance_region(instance.segmentation, job.size)] = instance.value
        except Exception as error:  # pycocotools raises the bare class for shapes it does not know
            return f"{job.target.stem}: an annotation cannot be drawn: {error!r}"
    write_mask(job.target, mask, fingerprint=job.fingerprint)
    return None


def instance_region(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Rasterise one segmentation as ``pycocotools`` does.

    Args:
        segmentation: A list of polygons, or run lengths, compressed or not.
        size: ``(H, W)``.
    """
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        runs = rle.merge(rle.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        runs = rle.frPyObjects(segmentation, *size)
    else:
        runs = segmentation
    region: UInt8[np.ndarray, "H W"] = rle.decode(runs)
    return region.astype(bool)


def annotation_file(root: Path, split: str) -> Path:
    """Find the JSON of a split.

    Raises:
        ConfigurationError: If it is nowhere; says where it looked.
    """
    places = [root / place for place in places_of(split, ANNOTATION_LAYOUTS)]
    for place in places:
        if place.is_file():
            return place
    raise ConfigurationError(
        f"root='{root}' has no annotations of '{split}': looked for {', '.join(map(str, places))}; unpack "
        "COCO's annotations there, or choose other splits"
    )


def coco_images(root: Path, split: str, first: str) -> Path:
    """Find the folder of a split's images.

    Args:
        root: Folder of the archives.
        split: Such as ``train2014``.
        first: Name of one image of the split.

    Raises:
        ConfigurationError: If there is no such folder; says where it looked.
    """
    folders = [root / place for place in places_of(split, IMAGE_LAYOUTS)]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    existing = [folder for folder in folders if folder.is_dir()]
    if existing:
        return existing[0]
    raise ConfigurationError(
        f"root='{root}' has no images of '{split}': {first} is not in {', '.join(map(str, folders))}"
    )


def places_of(split: str, layouts: Sequence[str]) -> list[str]:
    """Spell out layouts for a split: ``{role}`` is the split without its year."""
    return [layout.format(split=split, role=split.rstrip("0123456789")) for layout in layouts]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_CHUNK):
            digest.update(block)
    return digest.hexdigest()

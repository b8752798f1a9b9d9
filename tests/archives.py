"""Makers of archives in the official formats, and of folders of photographs, from generated pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy.io import savemat

from vpl_lightning.artifacts import voc_palette

VOC_NAMES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
ORIENTATION = 0x0112
"""EXIF tag of the orientation; 6 means: turn clockwise to see it upright."""


def picture(seed, size=(40, 60)):
    """An RGB picture of size (H, W): smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(rows / rng.uniform(3, 12) + columns / rng.uniform(3, 12) + phase) for phase in range(3)]
    noise = rng.normal(0, 8, (*size, 3))
    return np.clip(127 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def label_map(seed, labels, size=(40, 60), void=True):
    """A mask with one box a 0-based label, and a void border around the first."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    for place, label in enumerate(labels):
        top = int(rng.integers(0, max(1, size[0] // 2)))
        left = place * size[1] // len(labels)
        box = (slice(top, top + size[0] // 2 + 1), slice(left, left + size[1] // (len(labels) + 1) + 1))
        if void and place == 0:
            mask[max(0, top - 1) : box[0].stop + 1, left : box[1].stop + 1] = 255
        mask[box] = label + 1
    return mask


def save_palette(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    image.save(path)


def save_photo(path, pixels, kind="rgb"):
    """Write a JPEG: ``rgb``, ``grey``, ``cmyk`` or ``turned`` (EXIF orientation 6)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    options = {}
    if kind == "grey":
        image = image.convert("L")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "turned":
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        options["exif"] = exif
    image.save(path, quality=90, **options)


def write_xml(path, size, objects):
    """An annotation with (name, difficult) objects, as VOC writes them."""
    parts = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{int(hard)}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        for name, hard in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><folder>VOC2012</folder><filename>{path.stem}.jpg</filename><size><width>{size[1]}</width>"
        f"<height>{size[0]}</height><depth>3</depth></size><segmented>1</segmented>{parts}</annotation>"
    )


def write_list(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(ids) + "\n")


def make_voc(folder, *, train=4, val=3, augmented=3, test=0, sizes=None, kinds=None):
    """``VOCdevkit`` with trainval, and SBD beside it.

    SBD knows the images ``augmented`` and, as the real one, some of VOC's own; VOC's ``SegmentationClass``
    knows train and val.

    Args:
        sizes: (H, W) by id, else 40 x 60.
        kinds: Kind of JPEG by id, see :func:`save_photo`.

    Returns:
        ``VOCdevkit``, ``benchmark_RELEASE``, and the labels by id.
    """
    root = folder / "VOCdevkit" / "VOC2012"
    sbd = folder / "benchmark_RELEASE" / "dataset"
    splits = {
        "train": [f"2007_{number:06d}" for number in range(train)],
        "val": [f"2008_{number:06d}" for number in range(val)],
        "test": [f"2009_{number:06d}" for number in range(test)],
    }
    extra = [f"2020_{number:06d}" for number in range(augmented)]
    labels = {}
    for seed, name in enumerate([*splits["train"], *splits["val"], *extra, *splits["test"]]):
        size = (sizes or {}).get(name, (40, 60))
        save_photo(root / "JPEGImages" / f"{name}.jpg", picture(seed, size), (kinds or {}).get(name, "rgb"))
        if name in splits["test"]:
            continue
        labels[name] = sorted({seed % 20, (7 * seed + 3) % 20})
        objects = [(VOC_NAMES[label], place == 1) for place, label in enumerate(labels[name])]
        write_xml(root / "Annotations" / f"{name}.xml", size, [*objects, objects[0]])
        if name in extra:
            save_sbd(sbd / "cls" / f"{name}.mat", label_map(seed, labels[name], size, void=False))
        else:
            save_palette(root / "SegmentationClass" / f"{name}.png", label_map(seed, labels[name], size))
    for split, ids in splits.items():
        if ids:
            write_list(root / "ImageSets" / "Segmentation" / f"{split}.txt", ids)
    for name in splits["train"][:1] + splits["val"][:1]:
        save_sbd(sbd / "cls" / f"{name}.mat", label_map(99, [0], void=False))
    write_list(sbd / "train.txt", [*extra[:1], *splits["val"][:1]])
    write_list(sbd / "val.txt", [*extra[1:], *splits["train"][:1]])
    return folder / "VOCdevkit", folder / "benchmark_RELEASE", labels


def save_sbd(path, mask):
    """A ``.mat`` with SBD's nested ``GTcls`` structure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    present = np.unique(mask[mask > 0])[:, None]
    savemat(
        path, {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": present}}
    )


COCO_CATEGORIES = {1: "person", 18: "dog", 44: "bottle", 90: "toothbrush"}
"""Official ids, of which 1 to 90 is not contiguous."""


def make_coco(folder, *, images=4, split="train2014", layout="{split}", sizes=None, kinds=None):
    """``annotations/instances_<split>.json`` with polygons, crowds as run lengths, overlaps, and the images.

    Args:
        sizes: (H, W) by number, else 40 x 60.
        kinds: Kind of JPEG by number, see :func:`save_photo`; the second is grey otherwise.
    """
    rng = np.random.default_rng(len(split) + images)
    entries, annotations = [], []
    for number in range(images):
        name = f"COCO_{split}_{number:012d}.jpg"
        size = (sizes or {}).get(number, (40, 60))
        kind = (kinds or {1: "grey"}).get(number, "rgb")
        save_photo(folder / layout.format(split=split) / name, picture(number, size), kind)
        entries.append({"id": number + 5, "file_name": name, "height": size[0], "width": size[1]})
        if number == 2:
            continue  # an image without objects
        for category in rng.permutation(list(COCO_CATEGORIES))[:3]:
            annotations.append(_polygon(rng, len(annotations), number + 5, int(category), size))
        annotations.append(_crowd(rng, len(annotations), number + 5, 1, size))
    content = {
        "info": {"description": "generated"},
        "images": entries,
        "annotations": [annotations[place] for place in rng.permutation(len(annotations))],
        "categories": [{"id": key, "name": name} for key, name in COCO_CATEGORIES.items()],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _polygon(rng, number, image, category, size):
    height, width = rng.uniform(0.3, 0.9, 2) * size
    top, left = rng.uniform(0, 1, 2) * (size[0] - height, size[1] - width)
    outline = [
        left,
        top,
        left + width,
        top + height * 0.2,
        left + width * 0.7,
        top + height,
        left,
        top + height,
    ]
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "area": float(height * width),
        "segmentation": [[round(float(value), 2) for value in outline]],
    }


def _crowd(rng, number, image, category, size):
    region = np.zeros(size, np.uint8)
    top, left = rng.integers(0, max(1, size[0] // 2)), rng.integers(0, max(1, size[1] // 2))
    region[top : top + 9, left : left + 14] = 1
    runs = rle.encode(np.asfortranarray(region))
    counts = _uncompressed(region) if number % 2 else runs["counts"].decode()
    return {
        "id": 900_000 + number,
        "image_id": image,
        "category_id": category,
        "iscrowd": 1,
        "area": float(region.sum()),
        "segmentation": {"size": list(size), "counts": counts},
    }


def _uncompressed(region):
    flat = region.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    return [int(value) for value in np.diff(np.concatenate([[0], edges, [len(flat)]]))]


def make_folder(folder, *, photos=6, masks=2):
    """Own photographs: sub-folder, tags as CSV with a synonym, classes as YAML, some masks."""
    kinds = ["rgb", "grey", "cmyk", "turned"]
    tags = [["cat"], ["Kitten", "boat"], ["dog"], ["dog", "boat"], ["boat"], ["cat", "dog"]]
    rows = []
    for number in range(photos):
        file = f"trip/photo {number}.jpg" if number % 2 else f"photo {number}.jpg"
        save_photo(folder / "photos" / file, picture(number), kinds[number % 4])
        rows.append([file, "; ".join(tags[number % len(tags)])])
    with (folder / "tags.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "tags"], *rows])
    (folder / "classes.yaml").write_text(
        "foreground: [cat, dog, boat]\nsynonyms:\n  cat: [cat, kitten]\nbackground: [grass, sky, water]\n"
    )
    for number in range(masks):
        size = (60, 40) if kinds[number % 4] == "turned" else (40, 60)
        save_palette(folder / "masks" / f"photo {number}.png", label_map(number, [0], size))
    return folder


def truncate(path: Path, *, keep=0.6):
    """Cut a file off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def stored(path):
    """Indices of a PNG, read without the library."""
    with Image.open(path) as image:
        return np.array(image)


def tree(folder):
    """When every file was last written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}

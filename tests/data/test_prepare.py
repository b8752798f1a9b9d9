"""``vpl prepare``: lists, masks, policies, and the check of every file."""

import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.io import loadmat, savemat

from tests.archives import (
    COCO_CATEGORIES,
    VOC_NAMES,
    label_map,
    make_coco,
    make_folder,
    make_voc,
    picture,
    save_palette,
    save_photo,
    truncate,
    write_list,
    write_xml,
)
from vpl_lightning.archives import lists, voc
from vpl_lightning.archives.parallel import process_files
from vpl_lightning.artifacts import read_mask
from vpl_lightning.cli.prepare import prepare_coco, prepare_folder, prepare_voc
from vpl_lightning.clip import class_set
from vpl_lightning.data import COCODataModule, Entry, TaggedIndex, VOCDataModule
from vpl_lightning.errors import ConfigurationError, DataError


def stored(path):
    """Indices of a PNG, read without the library."""
    with Image.open(path) as image:
        return np.array(image)


def tree(folder):
    """When every file was last written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


# ---- VOC


def test_train_aug_and_its_masks_come_from_sbd(tmp_path):
    kinds = {"2007_000001": "grey", "2007_000002": "cmyk", "2007_000003": "turned"}
    sizes = {"2020_000000": (1, 1), "2020_000001": (700, 9)}
    root, sbd, labels = make_voc(tmp_path, kinds=kinds, sizes=sizes, test=1)
    before = tree(tmp_path)
    options = {"sbd": str(sbd), "official": False, "verify": True, "workers": 1}
    assert prepare_voc(str(root), output=str(tmp_path / "out"), **options) == 0
    assert {name: time for name, time in tree(tmp_path).items() if not name.startswith("out")} == before
    train_aug = [f"2007_{n:06d}" for n in range(4)] + [f"2020_{n:06d}" for n in range(3)]
    data = VOCDataModule(str(root), prepared=str(tmp_path / "out"), num_workers=0)
    images = data.evaluation_dataset("train")
    assert list(images.ids) == train_aug
    for row, name in enumerate(train_aug):
        assert images[row]["labels"] == labels[name]
        own = root / "VOC2012" / "SegmentationClass" / f"{name}.png"
        mat = sbd / "dataset" / "cls" / f"{name}.mat"
        # VOC's own masks go before SBD's, which have no void.
        truth = stored(own) if own.is_file() else loadmat(mat)["GTcls"][0, 0]["Segmentation"]
        np.testing.assert_array_equal(images[row]["mask"], truth)
    with Image.open(tmp_path / "out" / "SegmentationClassAug" / "2020_000002.png") as made:
        assert made.mode == "P"
        assert made.getpalette()[3:6] == [128, 0, 0]
    assert len(data.evaluation_dataset("val")) == 3


def test_nothing_that_exists_is_made_again(tmp_path):
    root, sbd, _ = make_voc(tmp_path)
    assert prepare_voc(str(root), sbd=str(sbd), official=False, workers=1) == 0
    before = tree(tmp_path)
    assert prepare_voc(str(root), sbd=str(sbd), official=False, workers=1) == 0
    assert tree(tmp_path) == before


def test_the_official_lists_follow_from_voc_and_sbd(tmp_path):
    official = {split: lists.official_voc_ids(split) for split in lists.OFFICIAL_VOC_COUNTS}
    assert {split: len(ids) for split, ids in official.items()} == lists.OFFICIAL_VOC_COUNTS
    assert set(official["train"]) <= set(official["train_aug"])
    # SBD annotates most of VOC's train and val, and 9,118 images more.
    extra = sorted(set(official["train_aug"]) - set(official["train"]))
    assert len(extra) == 9118
    write_list(tmp_path / "train.txt", extra[:6000] + official["val"][:500])
    write_list(tmp_path / "val.txt", extra[6000:] + official["val"][400:] + official["train"][:800])
    assert voc.derive_train_aug(official["train"], official["val"], tmp_path) == official["train_aug"]


def test_subsets_of_the_official_lists_are_named_and_others_refused(tmp_path, capsys):
    root, sbd, _ = make_voc(tmp_path)
    assert prepare_voc(str(root), sbd=str(sbd), workers=1) == 1
    printed = capsys.readouterr().out
    assert "2020_000002: train_aug; --official false accepts other lists" in printed
    subset = tmp_path / "subset" / "VOC2012"
    for name in (ids := lists.official_voc_ids("train")[:3]):
        save_photo(subset / "JPEGImages" / f"{name}.jpg", picture(1))
        write_xml(subset / "Annotations" / f"{name}.xml", (40, 60), [("cat", False)])
        save_palette(subset / "SegmentationClass" / f"{name}.png", label_map(1, [7]))
    write_list(subset / voc.LISTS / "train.txt", ids[:2])
    write_list(subset / voc.LISTS / "val.txt", ids[2:])
    assert prepare_voc(str(subset), workers=1) == 1
    assert f"{ids[2]}: val" in capsys.readouterr().out
    shutil.copy(subset / voc.LISTS / "train.txt", subset / voc.LISTS / "train_aug.txt")
    write_list(subset / voc.LISTS / "val.txt", lists.official_voc_ids("val")[:1])
    name = lists.official_voc_ids("val")[0]
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        shutil.copy(subset / folder / f"{ids[2]}.{suffix}", subset / folder / f"{name}.{suffix}")
    assert prepare_voc(str(subset), workers=1) == 0
    assert "train: 2 of 1,464 official images; a subset" in capsys.readouterr().out


def test_what_voc_lacks_is_named(tmp_path, capsys):
    root, sbd, _ = make_voc(tmp_path)
    with pytest.raises(ConfigurationError, match=r"sbd='.*VOCdevkit' is no SBD: no folder cls"):
        prepare_voc(str(root), sbd=str(root))
    (sbd / "dataset" / "cls" / "2020_000000.mat").unlink()
    savemat(sbd / "dataset" / "cls" / "2020_000001.mat", {"other": 1})
    savemat(sbd / "dataset" / "cls" / "2020_000002.mat", {"GTcls": {"Segmentation": np.full((40, 60), 21)}})
    (root / "VOC2012" / "JPEGImages" / "2008_000001.jpg").unlink()
    report = tmp_path / "report.json"
    assert prepare_voc(str(root), sbd=str(sbd), official=False, workers=1, report=str(report)) == 1
    faults = {(fault["kind"], fault["id"]) for fault in json.loads(report.read_text())["faults"]}
    assert faults == {
        ("mask missing", "2020_000000"),
        ("mask source unreadable", "2020_000001"),
        ("mask source unreadable", "2020_000002"),
        ("image missing", "2008_000001"),
    }
    assert "VOC 2012 in" in capsys.readouterr().out
    (root / "VOC2012" / voc.LISTS / "val.txt").unlink()
    with pytest.raises(ConfigurationError, match=r"has no val\.txt; unpack"):
        prepare_voc(str(root))


def plant(root: Path, names):
    """Plant three faults of each of ten kinds; return them as (kind, id)."""
    images, xmls, masks = root / "JPEGImages", root / "Annotations", root / "SegmentationClass"
    pixels = picture(3, (20, 24))

    def rgb_mask(name):
        Image.fromarray(pixels).save(masks / f"{name}.png")

    def png_as_jpg(name):
        Image.fromarray(pixels).save(images / f"{name}.jpg", format="PNG")

    planters = {
        "image missing": lambda name: (images / f"{name}.jpg").unlink(),
        "image file empty": lambda name: (images / f"{name}.jpg").write_bytes(b""),
        "image damaged": lambda name: truncate(images / f"{name}.jpg", keep=0.8),
        "image of wrong format": png_as_jpg,
        "image of wrong size": lambda name: save_photo(images / f"{name}.jpg", picture(1, (24, 20))),
        "image without tags": lambda name: write_xml(xmls / f"{name}.xml", (20, 24), []),
        "unknown class": lambda name: write_xml(xmls / f"{name}.xml", (20, 24), [("unicorn", False)]),
        "mask missing": lambda name: (masks / f"{name}.png").unlink(),
        "mask unreadable": rgb_mask,
        "mask with unknown values": lambda name: save_palette(
            masks / f"{name}.png", np.full((20, 24), 21, np.uint8)
        ),
    }
    chosen = iter(random.Random(5).sample(names, 3 * len(planters)))
    planted = set()
    for kind, planter in planters.items():
        for _ in range(3):
            name = next(chosen)
            planter(name)
            planted.add((kind, name))
    return planted


def test_thirty_faults_among_a_thousand_files_are_named_and_nothing_else(tmp_path, capsys):
    root = tmp_path / "VOC2012"
    names = [f"2011_{number:06d}" for number in range(340)]
    for seed, name in enumerate(names):
        kind = "grey" if seed % 9 == 0 else "rgb"
        save_photo(root / "JPEGImages" / f"{name}.jpg", picture(seed, (20, 24)), kind)
        write_xml(root / "Annotations" / f"{name}.xml", (20, 24), [(VOC_NAMES[seed % 20], False)])
        save_palette(root / "SegmentationClass" / f"{name}.png", label_map(seed, [seed % 20], (20, 24)))
    write_list(root / voc.LISTS / "train.txt", names[:300])
    write_list(root / voc.LISTS / "val.txt", names[300:])
    assert prepare_voc(str(root), official=False, verify=True, workers=1) == 0
    planted = plant(root, names)
    assert len({kind for kind, _ in planted}) == 10
    report = tmp_path / "report.json"
    options = {"official": False, "verify": True, "report": str(report)}
    assert prepare_voc(str(root), workers=2, **options) == 1
    found = [(fault["kind"], fault["id"]) for fault in json.loads(report.read_text())["faults"]]
    assert sorted(found) == sorted(planted)
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for _, name in planted)
    assert "30 faults in 340 images" in printed


def spoil(root, name, kind):
    image, xml = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
    mask = root / "SegmentationClass" / f"{name}.png"
    {
        "annotation missing": xml.unlink,
        "annotation unreadable": lambda: xml.write_text("<a>"),
        "not an image": lambda: image.write_text("text"),
        "image damaged": lambda: truncate(image, keep=0.99),  # the last bytes alone
        "mask of wrong size": lambda: save_palette(mask, label_map(1, [3], (9, 60))),
        "mask unreadable": lambda: truncate(mask),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "annotation missing",
        "annotation unreadable",
        "not an image",
        "image damaged",
        "mask of wrong size",
        "mask unreadable",
    ],
)
def test_further_faults(tmp_path, kind):
    root, _, _ = make_voc(tmp_path, augmented=0)
    spoil(root / "VOC2012", "2007_000002", kind)
    report = tmp_path / "report.json"
    assert prepare_voc(str(root), official=False, verify=True, workers=1, report=str(report)) == 1
    faults = json.loads(report.read_text())["faults"]
    assert [(fault["kind"], fault["id"]) for fault in faults] == [(kind, "2007_000002")]


# ---- COCO


def oracle_mask(path, image_id, *, crowd, order, size):
    """Paint with pycocotools' own ``annToMask``, one annotation at a time."""
    content = json.loads(path.read_text())
    coco = COCO(str(path))
    ids = sorted(item["id"] for item in content["categories"])
    names = {item["id"]: item["name"] for item in content["categories"]}
    values = {number: class_set("coco").foreground.index(names[number]) + 1 for number in ids}
    annotations = [item for item in content["annotations"] if item["image_id"] == image_id]
    if order == "area_desc":
        annotations = sorted(annotations, key=lambda item: item["area"], reverse=True)
    mask = np.zeros(size, np.uint8)
    for item in annotations:
        if item["iscrowd"] and crowd == "skip":
            continue
        mask[coco.annToMask(item) == 1] = 255 if item["iscrowd"] else values[item["category_id"]]
    return mask


@pytest.mark.parametrize("crowd", ["ignore255", "skip"])
@pytest.mark.parametrize("order", ["file", "area_desc"])
def test_masks_equal_those_painted_one_annotation_at_a_time(tmp_path, crowd, order):
    path = make_coco(tmp_path, images=5)
    options = {"splits": ["train2014"], "crowd": crowd, "order": order, "verify": True, "workers": 1}
    assert prepare_coco(str(tmp_path), **options) == 0
    folder = tmp_path / "SegmentationClass" / "train2014"
    assert len(list(folder.iterdir())) == 4
    for number in (0, 1, 3, 4):
        expected = oracle_mask(path, number + 5, crowd=crowd, order=order, size=(40, 60))
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(stored(folder / f"COCO_train2014_{number:012d}.png"), expected)
    policy = json.loads((tmp_path / "vpl_index" / "train2014.json").read_text())
    assert (policy["crowd"], policy["order"], len(policy["classes"])) == (crowd, order, 80)


def test_policies_differ_and_only_what_changed_is_painted_again(tmp_path):
    make_coco(tmp_path, images=5)
    base = {"splits": ["train2014"], "workers": 1}
    folder = tmp_path / "SegmentationClass"
    masks = {}
    for policy in ({}, {"crowd": "skip"}, {"order": "area_desc"}):
        assert prepare_coco(str(tmp_path), **base, **policy) == 0
        masks[str(policy)] = [stored(path).tobytes() for path in sorted(folder.rglob("*.png"))]
    assert len({str(value) for value in masks.values()}) == 3
    before = tree(folder)
    assert prepare_coco(str(tmp_path), **base, order="area_desc") == 0
    assert tree(folder) == before
    broken = next(folder.rglob("*.png"))
    truncate(broken)
    assert prepare_coco(str(tmp_path), **base, order="area_desc") == 0
    changed = {name for name, time in tree(folder).items() if time != before[name]}
    assert changed == {str(broken.relative_to(folder))}


def test_labels_are_contiguous_and_leave_crowds_out(tmp_path):
    path = make_coco(tmp_path, images=5)
    content = json.loads(path.read_text())
    assert prepare_coco(str(tmp_path), splits=["train2014"], workers=1) == 0
    index = TaggedIndex.load(tmp_path / "vpl_index" / "train2014")
    contiguous = dict(zip(COCO_CATEGORIES, (0, 16, 39, 79), strict=True))
    for row, number in enumerate((0, 1, 3, 4)):
        found = {
            contiguous[item["category_id"]]
            for item in content["annotations"]
            if item["image_id"] == number + 5 and not item["iscrowd"]
        }
        assert index.labels(row) == sorted(found)


def test_counts_of_the_official_splits_are_checked(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path, images=5)
    for official, code in {(5, 4): 0, (5, 3): 1, (4, 4): 1, (9, 9): 0}.items():
        monkeypatch.setitem(lists.OFFICIAL_COCO_COUNTS, "train2014", official)
        assert prepare_coco(str(tmp_path), splits=["train2014"], workers=1) == code
    assert "4 of 5 images show an object; the others are left out; a subset of the official 9" in (
        capsys.readouterr().out
    )


def test_what_coco_lacks_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"root='.*nowhere' is no folder"):
        prepare_coco(str(tmp_path / "nowhere"))
    path = make_coco(tmp_path, images=3)
    with pytest.raises(ConfigurationError, match=r"no annotations of 'val2014': looked for .*_val2014"):
        prepare_coco(str(tmp_path))
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[1.0, 2.0]]
    path.write_text(json.dumps(content))
    (tmp_path / "train2014" / "COCO_train2014_000000000000.jpg").unlink()
    save_photo(tmp_path / "train2014" / "COCO_train2014_000000000001.jpg", picture(1, (41, 60)))
    report = tmp_path / "report.json"
    options = {"splits": ["train2014"], "workers": 1, "verify": True, "report": str(report)}
    assert prepare_coco(str(tmp_path), **options) == 1
    kinds = sorted(fault["kind"] for fault in json.loads(report.read_text())["faults"])
    assert kinds == ["annotation unreadable", "image missing", "image of wrong size"]
    content["categories"][0]["name"] = "unicorn"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="categories unicorn, which the class set lacks"):
        prepare_coco(str(tmp_path), splits=["train2014"])
    content["categories"][0]["name"] = "person"
    for change, reason in {
        '{"category_id": 7}': "has the unknown category_id 7",
        '{"image_id": 99}': "has the unknown image_id 99",
        '{"iscrowd": null}': "lacks iscrowd",
    }.items():
        annotation = {**content["annotations"][0], **json.loads(change)}
        annotation = {key: value for key, value in annotation.items() if value is not None}
        path.write_text(json.dumps({**content, "annotations": [annotation]}))
        with pytest.raises(DataError, match=rf"annotation {annotation['id']} {reason}"):
            prepare_coco(str(tmp_path), splits=["train2014"])
    path.write_text("{}")
    with pytest.raises(DataError, match="is not COCO's instances JSON"):
        prepare_coco(str(tmp_path), splits=["train2014"])


def test_the_training_path_does_not_grow_with_the_number_of_images(tmp_path):
    """Six thousand further images may cost no more than their shuffled order does."""
    save_photo(tmp_path / "train2014" / "one.jpg", picture(1))
    peaks = {}
    for count in (400, 500, 6_500):  # the first also pays for imports
        prepared = tmp_path / str(count)
        entries = (Entry(f"COCO_train2014_{n:012d}", "one.jpg", [n % 80]) for n in range(count))
        TaggedIndex.of(entries).save(prepared / "vpl_index" / "train2014")
        masks = prepared / "masks"
        save_palette(masks / f"COCO_train2014_{0:012d}.png", label_map(1, [0]))
        for number in range(1, count):
            (masks / f"COCO_train2014_{number:012d}.png").hardlink_to(masks / f"COCO_train2014_{0:012d}.png")
        tracemalloc.start()
        data = COCODataModule(
            str(tmp_path), prepared=str(prepared), num_workers=0, crop_size=32, train_masks=str(masks)
        )
        for _, batch in zip(range(3), data.train_dataloader(), strict=False):
            assert batch["image"].shape == (4, 3, 32, 32)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[6_500] - peaks[500] < 6_000 * 16


# ---- own photographs


def test_own_photographs_are_checked(tmp_path, capsys):
    folder = make_folder(tmp_path)
    photos = str(folder / "photos")
    paths = {"tags": str(folder / "tags.csv"), "classes": str(folder / "classes.yaml")}
    options = {**paths, "masks": str(folder / "masks"), "verify": True, "workers": 1}
    assert prepare_folder(photos, **options) == 0
    assert "tags: cat 3, dog 3, boat 3" in capsys.readouterr().out
    truncate(folder / "photos" / "photo 4.jpg")
    save_photo(folder / "photos" / "new.jpg", picture(8))
    save_palette(folder / "masks" / "photo 0.png", label_map(1, [3]))
    with (folder / "tags.csv").open("a") as stream:
        stream.write("photo 0.jpg,dgo\nphoto 2.jpg,cat\ngone.jpg,cat\nbay/photo 2.jpg,boat\n")
    save_photo(folder / "photos" / "bay" / "photo 2.jpg", picture(9))
    save_palette(folder / "masks" / "foto 1.png", label_map(1, [0]))
    report = tmp_path / "report.json"
    assert prepare_folder(photos, **options, report=str(report)) == 1
    faults = json.loads(report.read_text())["faults"]
    assert {(fault["kind"], fault["id"]) for fault in faults} == {
        ("image damaged", "photo 4"),
        ("image missing", "gone"),
        ("image tagged twice", "photo 0"),
        ("image tagged twice", "photo 2"),
        ("id used twice", "photo 2"),
        ("mask without image", "foto 1"),
        ("image without tags", "new"),
        ("mask with unknown values", "photo 0"),
        ("unknown class", "photo 0"),
    }
    assert "'dgo' is no class or synonym of the class set 'classes'; did you mean 'dog'?" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigurationError, match="root='gone' is no folder"):
        prepare_folder("gone", **paths)
    with pytest.raises(ConfigurationError, match="masks='gone' is no folder"):
        prepare_folder(photos, **paths, masks="gone")


# ---- helpers


def test_results_keep_their_order_and_errors_come_back():
    square = process_files(abs, range(-50, 50), total=100, title="", workers=2)
    assert list(square) == [abs(number) for number in range(-50, 50)]
    with pytest.raises(DataError, match="no such mask"):
        list(process_files(read_mask, [Path("gone.png")] * 40, total=40, title="", workers=2))
    with pytest.raises(DataError, match="a helper process was ended from outside"):
        list(process_files(os._exit, [9] * 40, total=40, title="", workers=2))

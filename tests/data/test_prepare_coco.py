"""``vpl prepare coco``: masks, policies and counts."""

import json
import tracemalloc

import numpy as np
import pytest
from pycocotools.coco import COCO

from tests.archives import (
    COCO_CATEGORIES,
    label_map,
    make_coco,
    picture,
    save_palette,
    save_photo,
    stored,
    tree,
    truncate,
)
from vpl_lightning.archives import lists
from vpl_lightning.cli.prepare import prepare_coco
from vpl_lightning.clip import class_set
from vpl_lightning.data import COCODataModule, Entry, TaggedIndex
from vpl_lightning.errors import ConfigurationError, DataError


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

"""``vpl prepare voc``: lists, masks, and the check of every file."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from tests.archives import (
    VOC_NAMES,
    label_map,
    make_voc,
    picture,
    save_palette,
    save_photo,
    stored,
    tree,
    truncate,
    write_list,
    write_xml,
)
from vpl_lightning.archives import lists, voc
from vpl_lightning.cli.prepare import prepare_voc
from vpl_lightning.data import VOCDataModule
from vpl_lightning.errors import ConfigurationError


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

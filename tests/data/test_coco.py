"""COCO from prepared files."""

import pytest

from tests.archives import make_coco
from vpl_lightning.cli.prepare import prepare_coco
from vpl_lightning.data import COCODataModule
from vpl_lightning.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_coco(root, images=4)
    make_coco(root, images=3, split="val2014")
    assert prepare_coco(str(root), workers=1) == 0
    return root


def test_splits_hold_the_images_with_objects(coco):
    data = COCODataModule(str(coco), num_workers=0)
    data.setup("fit")
    train = data.localisation_dataset("train")
    assert list(train.ids) == [f"COCO_train2014_{number:012d}" for number in (0, 1, 3)]
    assert all(sample["image"].shape == (40, 60, 3) and sample["labels"] for sample in train)
    val = data.evaluation_dataset("val")
    assert list(val.ids) == [f"COCO_val2014_{number:012d}" for number in (0, 1)]
    assert all(sample["mask"].shape == (40, 60) for sample in val)


@pytest.mark.parametrize("layout", ["images/{split}", "JPEGImages/{split}", "JPEGImages/train"])
def test_usual_layouts_are_recognised(coco, tmp_path, layout):
    make_coco(tmp_path, images=4, layout=layout)
    data = COCODataModule(str(tmp_path), prepared=str(coco), num_workers=0)
    assert data.localisation_dataset("train")[0]["image"].shape == (40, 60, 3)


def test_masks_of_others_may_leave_out_the_start_of_the_id(coco, tmp_path):
    for path in (coco / "SegmentationClass" / "train2014").glob("*.png"):
        other = tmp_path / "gt" / "train2014" / path.name.removeprefix("COCO_train2014_")
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
    plain = COCODataModule(str(coco), num_workers=0).evaluation_dataset("train")
    data = COCODataModule(str(coco), num_workers=0, masks=str(tmp_path / "gt" / "{split}"))
    for one, other in zip(plain, data.evaluation_dataset("train"), strict=True):
        assert (one["mask"] == other["mask"]).all()


def test_what_is_missing_is_named(coco, tmp_path):
    with pytest.raises(ConfigurationError, match=r"data\.root='.*nowhere' is no folder"):
        COCODataModule(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"'train2017' is not prepared: .* has train2014, val2014"):
        COCODataModule(str(coco), train_split="train2017").localisation_dataset("train")
    with pytest.raises(ConfigurationError, match=r"no images of 'train2014': COCO_train2014_0+\.jpg"):
        COCODataModule(str(tmp_path), prepared=str(coco)).localisation_dataset("train")
    with pytest.raises(DataError, match=r"no mask of 'COCO_val2014_0+', the first image of 'val2014'"):
        COCODataModule(str(coco), masks="elsewhere").evaluation_dataset("val")

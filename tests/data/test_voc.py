"""VOC in the devkit's layout."""

import shutil

import numpy as np
import pytest

from tests.archives import VOC_NAMES, make_voc, picture, save_photo, write_list
from vpl_lightning.data import VOCDataModule
from vpl_lightning.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"), train=4, val=3, augmented=0)


def module(root, **options):
    return VOCDataModule(str(root), **{"train_split": "train", "num_workers": 0, "crop_size": 32, **options})


def test_the_root_may_be_any_of_the_usual_folders(devkit):
    for root in (devkit[0].parent / "VOCdevkit", devkit[0] / "VOC2012", devkit[0].parent):
        assert len(module(root).localisation_dataset()) == 4


def test_labels_come_from_xml_in_order_of_appearance_and_masks_as_indices(devkit):
    root, _, labels = devkit
    images = module(root).evaluation_dataset("val")
    for row, name in enumerate(images.ids):
        sample = images[row]
        assert sample["id"] == name
        assert sample["labels"] == labels[name]
        assert set(np.unique(sample["mask"])) == {0, 255, *(label + 1 for label in labels[name])}
        assert images.labels(row) == labels[name]


def test_difficult_objects_can_be_left_out(devkit):
    root, _, labels = devkit
    plain = module(root, labels="xml_no_difficult").localisation_dataset()
    # The second class of an image is marked as difficult.
    assert [plain.labels(row) for row in range(4)] == [labels[name][:1] for name in plain.ids]


def test_labels_from_masks_are_those_of_the_xml_here(devkit):
    root, _, labels = devkit
    images = module(root, labels="mask").localisation_dataset()
    assert [images.labels(row) for row in range(4)] == [labels[name] for name in images.ids]


def test_labels_from_files(devkit, tmp_path):
    root, _, labels = devkit
    one_hot = np.zeros((len(labels), 20), np.uint8)
    for row, name in enumerate(labels):
        one_hot[row, labels[name]] = 1
    np.savez(tmp_path / "labels.npz", ids=np.array(list(labels), "S"), labels=one_hot)
    (tmp_path / "labels.txt").write_text(
        "".join(f"{n} {' '.join(map(str, ls))}\n" for n, ls in labels.items())
    )
    (tmp_path / "labels.csv").write_text(
        "file,tags\n" + "".join(f"{n}.jpg,{';'.join(VOC_NAMES[x] for x in ls)}\n" for n, ls in labels.items())
    )
    for suffix in ("npz", "txt", "csv"):
        images = module(root, labels=str(tmp_path / f"labels.{suffix}")).localisation_dataset()
        assert [images.labels(row) for row in range(4)] == [labels[name] for name in images.ids]


def test_wrong_label_files_are_named(devkit, tmp_path):
    root = devkit[0]
    (tmp_path / "a.txt").write_text("2007_000000 3 20\n")
    (tmp_path / "b.csv").write_text("file,tags\n2007_000000.jpg,zebra\n")
    np.savez(tmp_path / "c.npz", ids=np.array(["x"]), labels=np.zeros((1, 80)))
    np.save(tmp_path / "d.npy", np.zeros(3))
    (tmp_path / "e.npz").write_bytes(b"")
    (tmp_path / "f.txt").write_text("2007_000000 3\n2007_000001 4\n2007_000000 5\n")
    np.savez(tmp_path / "g.npz", ids=np.array(["x", "x"]), labels=np.zeros((2, 20)))
    np.savez(tmp_path / "h.npz", ids=np.array(["x"]), labels=np.full((1, 20), 0.3))
    (tmp_path / "i.csv").write_text("file,tags\n2007_000000.jpg,cat\n2007_000000,dog\n")
    for name, reason in {
        "a.txt": "class ids below 20",
        "b.csv": "'zebra' is no class",
        "c.npz": r"labels has shape \(1, 80\)",
        "e.npz": "cannot be read as arrays",
        "f.txt": "'2007_000000' comes twice; keep one",
        "g.npz": "'x' comes twice",
        "h.npz": "labels must be 0 or 1",
        "i.csv": "'2007_000000' comes twice",
    }.items():
        with pytest.raises(DataError, match=reason):
            module(root, labels=str(tmp_path / name)).localisation_dataset()
    with pytest.raises(ConfigurationError, match="can run code"):
        module(root, labels=str(tmp_path / "d.npy")).localisation_dataset()
    with pytest.raises(ConfigurationError, match=r"data\.labels='boxes' is neither"):
        module(root, labels="boxes")


def test_a_class_that_the_class_set_lacks_is_named(devkit):
    with pytest.raises(DataError, match=r"000000\.xml: class 'aeroplane' is not in the class set 'coco'"):
        module(devkit[0], classes="coco").localisation_dataset()


def test_what_is_missing_is_named(devkit, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no folder JPEGImages in .*VOCdevkit/VOC2012"):
        module(tmp_path)
    root = shutil.copytree(devkit[0], tmp_path / "copy")
    lists = root / "VOC2012" / "ImageSets" / "Segmentation"
    with pytest.raises(ConfigurationError, match=r"train_aug\.txt; there are: train, val; 'vpl prepare"):
        module(root, train_split="train_aug").localisation_dataset()
    write_list(lists / "odd.txt", ["2007_000000", "2007_000001", "2007_000000"])
    with pytest.raises(DataError, match=r"odd\.txt lists '2007_000000' twice"):
        module(root, train_split="odd").localisation_dataset()
    (root / "VOC2012" / "JPEGImages" / "2008_000001.jpg").unlink()
    (root / "VOC2012" / "SegmentationClass" / "2008_000002.png").unlink()
    with pytest.raises(DataError, match=r"2 files are missing: .*2008_000001\.jpg, .*2008_000002\.png"):
        module(root).setup("fit")
    (root / "VOC2012" / "Annotations" / "2008_000000.xml").unlink()
    with pytest.raises(DataError, match=r"2008_000000\.xml is missing: no image-level labels"):
        module(root).localisation_dataset("val")
    shutil.rmtree(root / "VOC2012" / "SegmentationClass")
    with pytest.raises(DataError, match=r"no masks; looked for .*ClassAug.*run 'vpl prepare voc'"):
        module(root).evaluation_dataset("train")


def test_the_test_server_s_images_need_neither_tags_nor_masks(devkit, tmp_path):
    root = shutil.copytree(devkit[0], tmp_path / "copy")
    save_photo(root / "VOC2012" / "JPEGImages" / "2009_000000.jpg", picture(9))
    write_list(root / "VOC2012" / "ImageSets" / "Segmentation" / "test.txt", ["2009_000000"])
    data = module(root, predict="test", test_split="test")
    batch = next(iter(data.predict_dataloader()))
    assert batch["id"] == ["2009_000000"]
    assert batch["mask"] == [None]
    assert not batch["labels"].any()
    with pytest.raises(ConfigurationError, match="split 'test' has no true masks"):
        data.test_dataloader()
    with pytest.raises(DataError, match=r"2009_000000\.xml is missing"):
        data.localisation_dataset("test")

"""What every data module does: loaders, bad images, training masks, predicting."""

import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from torch import distributed

from tests.archives import make_voc, picture, save_palette, save_photo, truncate
from vpl_lightning.data import Augmentation, ShapesDataModule, VOCDataModule
from vpl_lightning.data.scenes import CLASSES, render_scene
from vpl_lightning.data.shapes import FIRST_SERIES
from vpl_lightning.errors import ConfigurationError, DataError


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"), train=7, val=5, augmented=0)[0]


def voc(root, **options):
    base = {
        "train_split": "train",
        "num_workers": 0,
        "crop_size": 32,
        "batch_size": 3,
        "train_masks": "truth",
    }
    return VOCDataModule(str(root), **{**base, **options})


def test_training_batches(devkit):
    data = voc(devkit)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, 32, 32), torch.uint8)
        assert (batch["mask"].shape, batch["mask"].dtype) == ((3, 32, 32), torch.int64)
        assert (batch["labels"].shape, batch["labels"].dtype) == ((3, 20), torch.bool)
        for name, labels, mask in zip(batch["id"], batch["labels"], batch["mask"], strict=True):
            row = list(data.localisation_dataset().ids).index(name)
            assert labels.nonzero().flatten().tolist() == data.localisation_dataset().labels(row)
            assert set(mask.unique().tolist()) <= {0, 255, *(labels.nonzero().flatten() + 1).tolist()}


def test_workers_change_nothing(devkit):
    expected = list(voc(devkit).train_dataloader())
    seen = list(voc(devkit, num_workers=2).train_dataloader())
    other = list(voc(devkit, seed=1).train_dataloader())
    for one, two in zip(expected, seen, strict=True):
        assert one["id"] == two["id"]
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["mask"], two["mask"])
    assert any(not torch.equal(one["image"], two["image"]) for one, two in zip(expected, other, strict=True))


def test_epochs_differ_and_come_back(devkit):
    loader = voc(devkit).train_dataloader()
    first = next(iter(loader))["image"]
    loader.sampler.set_epoch(1)
    second = next(iter(loader))["image"]
    loader.sampler.set_epoch(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(loader))["image"])


def test_evaluation_batches_keep_sizes_and_order(devkit):
    data = voc(devkit)
    batches = list(data.val_dataloader())
    assert [batch["id"] for batch in batches] == [[f"2008_{number:06d}"] for number in range(5)]
    sample = data.evaluation_dataset("val")[2]
    assert torch.equal(batches[2]["image"][0].permute(1, 2, 0), torch.from_numpy(sample["image"]))
    assert torch.equal(batches[2]["mask"][0], torch.from_numpy(sample["mask"]).long())
    assert batches[2]["labels"][0].nonzero().flatten().tolist() == sample["labels"]


def test_localisation_batches_skip_what_is_done(devkit):
    loader = voc(devkit).localisation_dataloader(2, skip={"2007_000001", "2007_000004"})
    assert [[s["id"][-1] for s in batch] for batch in loader] == [["0", "2"], ["3", "5"], ["6"]]
    assert all(sample["mask"] is None for batch in loader for sample in batch)


def test_phase_2_needs_masks_of_every_image(devkit, tmp_path):
    data = voc(devkit, train_masks=None)
    with pytest.raises(ConfigurationError, match="phase 2 needs training masks"):
        data.train_dataloader()
    for number in range(6):
        save_palette(tmp_path / f"2007_{number:06d}.png", np.full((40, 60), 7, np.uint8))
    data.use_pseudo_masks(tmp_path)
    with pytest.raises(DataError, match=r"1 of 7 training images have no mask: .*2007_000006\.png"):
        data.train_dataloader()
    save_palette(tmp_path / "2007_000006.png", np.full((40, 60), 7, np.uint8))
    masks = torch.cat([batch["mask"].flatten() for batch in data.train_dataloader()])
    assert set(masks.tolist()) <= {7, 255}
    assert len(voc(devkit, train_masks=str(tmp_path)).train_dataloader()) == 2
    with pytest.raises(ConfigurationError, match=r"data\.train_masks='nowhere' is no folder"):
        voc(devkit, train_masks="nowhere")


def test_predict_reads_a_split_a_file_or_a_folder(devkit, tmp_path):
    assert len(voc(devkit, predict="train").predict_dataloader()) == 7
    photo = tmp_path / "sub" / "one.jpg"
    save_photo(photo, picture(1), "turned")
    for target in (photo, tmp_path):
        batches = list(voc(devkit, predict=str(target)).predict_dataloader())
        assert [batch["id"] for batch in batches] == [["one"]]
        assert batches[0]["image"][0].shape == (3, 60, 40)
    save_photo(tmp_path / "one.png", picture(2))
    with pytest.raises(DataError, match="image id 'one' comes twice"):
        voc(devkit, predict=str(tmp_path)).predict_dataloader()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no image"):
        voc(devkit, predict=str(tmp_path / "empty")).predict_dataloader()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match=r"notes\.txt is no image"):
        voc(devkit, predict=str(tmp_path / "notes.txt")).predict_dataloader()
    with pytest.raises(ConfigurationError, match="split 'elsewhere' has no list"):
        voc(devkit, predict="elsewhere").predict_dataloader()


@pytest.fixture
def damaged(devkit, tmp_path):
    root = shutil.copytree(devkit, tmp_path / "VOCdevkit")
    truncate(root / "VOC2012" / "JPEGImages" / "2007_000002.jpg")
    (root / "VOC2012" / "JPEGImages" / "2007_000005.jpg").unlink()
    truncate(root / "VOC2012" / "SegmentationClass" / "2008_000003.png")
    return root


def test_bad_images_stop_the_run_by_default(damaged):
    data = voc(damaged)
    with pytest.raises(DataError, match=r"1 files are missing: .*2007_000005\.jpg"):
        data.localisation_dataset()
    with pytest.raises(DataError, match=r"2008_000003\.png"):
        list(data.val_dataloader())


def test_bad_images_can_be_listed_all_at_once(damaged):
    with pytest.raises(DataError, match=r"(?s)2 of 7 images cannot be used:.*2007_000002: .*2007_000005: "):
        voc(damaged, on_bad_image="list").localisation_dataset()


def test_bad_images_can_be_left_out_aloud(damaged, capsys):
    data = voc(damaged, on_bad_image="skip", num_workers=2)
    assert [name[-1] for name in data.localisation_dataset().ids] == list("01346")
    assert [name[-1] for name in data.evaluation_dataset("val").ids] == list("0124")
    printed = capsys.readouterr().out
    assert "leaving out 2 of 7 images" in printed
    assert "2007_000002" in printed
    assert "2008_000003" in printed


def test_nothing_is_left_of_a_split_without_a_good_image(devkit, tmp_path):
    root = shutil.copytree(devkit, tmp_path / "VOCdevkit")
    for path in (root / "VOC2012" / "JPEGImages").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 7 images can be used"):
        voc(root, on_bad_image="skip").localisation_dataset()


def rank_work(rank, rendezvous, root, results):
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    data = voc(root, on_bad_image="skip", batch_size=2)
    ids = list(data.localisation_dataset().ids)
    val = [name for batch in data.val_dataloader() for name in batch["id"]]
    train = [name for batch in data.train_dataloader() for name in batch["id"]]
    results.put((rank, ids, val, train))
    distributed.destroy_process_group()


def test_two_ranks_decide_alike_and_share_every_image_once(damaged, tmp_path, devkit):
    # The masks of training images are whole, the images are not: both ranks must leave out the same two.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    options = (str(tmp_path / "rendezvous"), str(damaged), results)
    processes = [context.Process(target=rank_work, args=(rank, *options)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found[0][1] == found[1][1] == [f"2007_00000{digit}" for digit in "01346"]
    assert sorted(found[0][2] + found[1][2]) == [f"2008_00000{digit}" for digit in "0124"]
    assert len(found[0][3]) == len(found[1][3]) == 2
    assert not set(found[0][3]) & set(found[1][3])


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 0), ("num_workers", -1), ("crop_size", 0), ("seed", -1)],
)
def test_impossible_settings_are_named(devkit, key, value):
    with pytest.raises(ConfigurationError, match=f"data.{key}="):
        voc(devkit, **{key: value})


def test_an_unknown_policy_is_refused(devkit):
    with pytest.raises((ConfigurationError, TypeError), match="ignore"):
        voc(devkit, on_bad_image="ignore")


def test_the_fingerprint_follows_ids_and_tags(devkit, tmp_path):
    plain = voc(devkit).fingerprint()
    assert voc(devkit, batch_size=1, seed=3).fingerprint() == plain
    assert voc(devkit, labels="xml_no_difficult").fingerprint() != plain
    assert voc(devkit, train_split="val").fingerprint() != plain


# ---- drawn scenes


def shapes(**options):
    return ShapesDataModule(**{"train_images": 12, "val_images": 5, "test_images": 4, **options})


def test_drawn_scenes_are_what_the_painter_draws():
    data = shapes(seed=3)
    assert data.classes.foreground == CLASSES
    for split, series in {"train": 9, "val": 10, "test": 11}.items():
        images = data.evaluation_dataset(split)
        scene = render_scene(FIRST_SERIES + series, 2)
        sample = images[2]
        np.testing.assert_array_equal(sample["image"], scene.image)
        np.testing.assert_array_equal(sample["mask"], scene.mask)
        assert sample["labels"] == list(scene.labels)
        assert data.localisation_dataset(split)[2]["mask"] is None
    assert [len(data.localisation_dataset(split)) for split in ("train", "val", "test")] == [12, 5, 4]


def test_a_reader_cannot_spoil_a_scene():
    data = shapes()
    data.evaluation_dataset("val")[0]["image"][:] = 0
    assert data.evaluation_dataset("val")[0]["image"].any()


def test_drawn_scenes_train_on_masks_of_others_too(tmp_path):
    data = shapes(batch_size=4, crop_size=64, augmentation=Augmentation(scale_min=1.0, scale_max=1.0))
    for name in data.localisation_dataset().ids:
        save_palette(tmp_path / f"{name}.png", np.full((112, 112), 3, np.uint8))
    data.use_pseudo_masks(tmp_path)
    assert {int(value) for batch in data.train_dataloader() for value in batch["mask"].unique()} == {3}
    data.use_true_masks()
    assert len({int(value) for batch in data.train_dataloader() for value in batch["mask"].unique()}) > 2


def test_impossible_scenes_are_named():
    with pytest.raises(ConfigurationError, match=r"data\.val_images=0"):
        shapes(val_images=0)
    with pytest.raises(ConfigurationError, match=r"data\.size=0"):
        shapes(size=0)
    with pytest.raises(ConfigurationError, match="unknown split 'dev'"):
        shapes().localisation_dataset("dev")
    with pytest.raises(ConfigurationError, match="the class set 'voc' has aeroplane"):
        shapes(classes="voc")

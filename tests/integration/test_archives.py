"""From archives in the official formats to masks and scores, through the command line alone."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from tests.archives import make_coco, make_voc, picture, save_photo, truncate
from tests.models import tiny_clip
from tests.openai_style import openai_style
from vpl_lightning.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),  # a stage that is run again
]
WIDE, TALL = (30, 4000), (4000, 10)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where both its caller and the process have arguments."""
    monkeypatch.setattr("sys.argv", ["vpl"])


def write_config(root: Path, data: dict[str, Any]) -> str:
    """Write weights as OpenAI saves them, and a configuration of the whole method in a few steps."""
    weights = openai_style(
        tiny_clip(patch_size=16, image_size=64).state_dict(), patch_size=16, image_size=64
    ).state_dict()
    torch.save(weights, root / "clip.pt")
    localiser = {
        "encoder": {"checkpoint": str(root / "clip.pt")},
        "recipe": {"solver": {"steps": 5}},
        "masks": {"confidence": 0.5},
        "block_size": 3,
        "batch_size": 2,
        "mask_workers": 0,
        "score_masks": False,
    }
    model = {
        "localiser": {"class_path": "VisionPrototypeModule", "init_args": localiser},
        "decoder": {"width": 32, "blocks": 1, "heads": 2},
        "evaluation": {"scales": [1.0], "flip": False, "long_side": 256, "crf": None},
    }
    trainer = {
        "default_root_dir": str(root / "run"),
        "accelerator": "cpu",
        "max_steps": 2,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
    }
    settings = {"batch_size": 2, "crop_size": 64, "num_workers": 0}
    data = {"class_path": data.pop("class_path"), "init_args": {**data, **settings}}
    config = {"model": {"class_path": "DecoderModule", "init_args": model}, "data": data, "trainer": trainer}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return f"--config={root / 'config.yaml'}"


def run(*words: str | Path) -> None:
    """Run a command that must succeed."""
    assert main([str(word) for word in words]) == 0


def stored(path: Path | io.BytesIO) -> np.ndarray:
    """Indices of a palette PNG, read without the library."""
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def sizes_of(folder: Path) -> dict[str, tuple[int, int]]:
    """(H, W) by id of the masks in a folder."""
    return {path.stem: stored(path).shape for path in sorted(folder.glob("*.png"))}


def torchmetrics_miou(masks: Path, truth: Path, classes: int) -> float:
    """MIoU over all pixels with a true class, by torchmetrics; void predictions count as background."""
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=255)
    present = torch.zeros(classes, dtype=torch.bool)
    for path in masks.glob("*.png"):
        target = torch.from_numpy(stored(truth / path.name).astype(np.int64))
        guess = torch.from_numpy(stored(path).astype(np.int64))
        metric.update(guess.where(guess != 255, 0), target)
        present[target[target != 255].unique()] = True
    return float(metric.compute()[present].double().mean())


# ---- VOC and SBD


SIZES = {"2007_000000": (1, 1), "2007_000001": WIDE, "2008_000001": (1, 1), "2020_000001": TALL}
KINDS = {
    "2007_000002": "grey",
    "2007_000003": "cmyk",
    "2008_000000": "turned",
    "2009_000000": "grey",
    "2009_000001": "turned",
    "2020_000000": "cmyk",
}
TRAIN_AUG = [f"2007_{n:06d}" for n in range(4)] + [f"2020_{n:06d}" for n in range(3)]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A VOC that has gone through ``prepare`` and ``fit``, and its configuration."""
    root = tmp_path_factory.mktemp("voc")
    devkit, sbd, _ = make_voc(root, sizes=SIZES, kinds=KINDS, test=2)
    config = write_config(root, {"class_path": "VOCDataModule", "root": str(devkit)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vpl"])
        words = ("--official", "false", "--verify", "--workers", "1")
        run("prepare", "voc", devkit, "--sbd", sbd, *words)
        run("fit", config)
    return root, config


def test_voc_becomes_masks_and_a_decoder(voc: tuple[Path, str]) -> None:
    root, _ = voc
    made = root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    expected = {name: SIZES.get(name, (40, 60)) for name in TRAIN_AUG}
    assert {name: size for name, size in sizes_of(made).items() if name in expected} == expected
    assert sizes_of(root / "run" / "pseudo_masks") == expected
    report = json.loads((root / "run" / "report.json").read_text())
    assert report["decoder"]["miou"] is not None
    assert (root / "run" / "decoder" / "checkpoints" / "last.ckpt").is_file()


def test_voc_masks_are_scored_as_torchmetrics_does(voc: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = voc
    masks, truth = root / "run" / "pseudo_masks", root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    words = ("--void", "background", "--workers", "1")
    run("evaluate", masks, "--against", truth, *words, "--out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["images"] == len(TRAIN_AUG)
    assert scores["miou"] == pytest.approx(torchmetrics_miou(masks, truth, 21), abs=1e-6)
    run("evaluate", truth, "--against", truth, "--workers", "1", "--out", tmp_path / "true")
    assert json.loads((tmp_path / "true" / "scores.json").read_text())["miou"] == 1.0


def test_a_run_killed_after_the_last_mask_makes_none_again(voc: tuple[Path, str]) -> None:
    root, config = voc
    folder = root / "run" / "pseudo_masks"
    record = json.loads((folder / "manifest.json").read_text())
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    (folder / "manifest.json").write_text(json.dumps({**record, "complete": False}))
    run("fit", config)
    assert json.loads((folder / "manifest.json").read_text()) == record
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before


def test_voc_test_split_becomes_a_server_archive(voc: tuple[Path, str], tmp_path: Path) -> None:
    _, config = voc
    wanted = ("soft=true", "overlays=true", "server_archive=true", f"folder={tmp_path}")
    run("predict", config, "--data.predict=test", *(f"--model.prediction.{word}" for word in wanted))
    # The server's masks fit the stored pixels, whatever the EXIF orientation says.
    assert sizes_of(tmp_path) == {"2009_000000": (40, 60), "2009_000001": (40, 60)}
    with tarfile.open(tmp_path / "voc2012_comp6_test_cls.tar.gz") as archive:
        names = archive.getnames()
        masks = [stored(io.BytesIO(archive.extractfile(name).read())) for name in names]
    assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/2009_00000{n}.png" for n in range(2)]
    assert all(mask.max() <= 20 for mask in masks)
    for name in ("2009_000000", "2009_000001"):
        mask = stored(tmp_path / f"{name}.png").astype(np.int64)
        with np.load(tmp_path / "soft" / f"{name}.npz") as soft:
            probabilities = soft["probabilities"].astype(np.float32)
        assert probabilities.shape == (21, 40, 60)
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=5e-3)
        chosen = np.take_along_axis(probabilities, mask[None], 0)[0]
        np.testing.assert_allclose(chosen, probabilities.max(0), atol=2e-3)
        with Image.open(tmp_path / "overlays" / f"{name}.png") as overlay:
            assert overlay.size == (60, 40)


def test_files_and_folders_are_predicted_upright(voc: tuple[Path, str], tmp_path: Path) -> None:
    _, config = voc
    kinds = {"turned": (60, 40), "cmyk": (40, 60), "grey": (40, 60), "rgb": (40, 60)}
    for seed, kind in enumerate(kinds):
        save_photo(tmp_path / "photos" / "sub" / f"{kind}.jpg", picture(seed), kind)
    save_photo(tmp_path / "photos" / "one.jpg", picture(7, (1, 1)))
    out = f"--model.prediction.folder={tmp_path / 'out'}"
    run("predict", config, out, f"--data.predict={tmp_path / 'photos' / 'sub' / 'turned.jpg'}")
    assert sizes_of(tmp_path / "out") == {"turned": (60, 40)}
    alone = (tmp_path / "out" / "turned.png").read_bytes()
    run("predict", config, out, f"--data.predict={tmp_path / 'photos'}")
    assert sizes_of(tmp_path / "out") == {**kinds, "one": (1, 1)}
    assert (tmp_path / "out" / "turned.png").read_bytes() == alone


def test_predicting_what_does_not_exist(voc: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", voc[1], "--data.predict=photo.jpg"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.predict='photo.jpg' is no path; split 'photo.jpg' has no list" in line
    assert "there are: test, train, train_aug, val" in line


def test_bad_images_are_named_or_left_out(
    voc: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = voc
    for seed in range(3):
        save_photo(tmp_path / "photos" / f"photo_{seed}.jpg", picture(seed))
    truncate(tmp_path / "photos" / "photo_1.jpg")
    words = ["predict", config, f"--data.predict={tmp_path / 'photos'}"]
    words += [f"--model.prediction.folder={tmp_path / 'out'}"]
    for policy in (("raise", 0), ("raise", 1), ("list", 0)):
        options = zip(("--data.on_bad_image", "--data.num_workers"), map(str, policy), strict=True)
        assert main([*words, *map("=".join, options)]) == 1
        said = capsys.readouterr().err
        assert "Original Traceback" not in said
        assert "photo_1.jpg cannot be decoded" in said.splitlines()[-1]
    run(*words, "--data.on_bad_image=skip")
    assert "leaving out 1 of 3 images" in capsys.readouterr().out
    assert set(sizes_of(tmp_path / "out")) == {"photo_0", "photo_2"}


# ---- COCO


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A COCO that has gone through ``prepare`` and ``fit``, and its configuration."""
    root = tmp_path_factory.mktemp("coco")
    sizes, kinds = {0: (1, 1), 3: WIDE, 4: TALL}, {1: "grey", 5: "cmyk", 6: "turned"}
    make_coco(root / "coco2014", images=7, sizes=sizes, kinds=kinds)
    make_coco(root / "coco2014", images=3, split="val2014")
    config = write_config(root, {"class_path": "COCODataModule", "root": str(root / "coco2014")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vpl"])
        run("prepare", "coco", root / "coco2014", "--verify", "--workers", "1")
        run("fit", config)
    return root, config


def test_coco_becomes_masks_and_a_decoder(coco: tuple[Path, str], tmp_path: Path) -> None:
    root, config = coco
    truth, masks = root / "coco2014" / "SegmentationClass", root / "run" / "pseudo_masks"
    found = sizes_of(masks)
    assert found == sizes_of(truth / "train2014")
    assert [size for size in found.values() if size != (40, 60)] == [(1, 1), WIDE, TALL]
    words = ("--classes", "coco", "--void", "background", "--workers", "1")
    run("evaluate", masks, "--against", truth / "train2014", *words, "--out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores["confusion"]) == 81
    expected = torchmetrics_miou(masks, truth / "train2014", 81)
    assert scores["miou"] == pytest.approx(expected, abs=1e-6)
    run("predict", config, "--data.predict=val", f"--model.prediction.folder={tmp_path / 'val'}")
    assert sizes_of(tmp_path / "val") == sizes_of(truth / "val2014")

"""``vpl evaluate``: equal to independent computations to the last bit."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_erosion
from sklearn.metrics import confusion_matrix

from tests.archives import label_map, save_palette
from vpl_lightning.artifacts import write_clip_es
from vpl_lightning.cli.evaluate import evaluate
from vpl_lightning.cli.scoring import POWERS, THRESHOLDS, Background
from vpl_lightning.errors import ConfigurationError, DataError


def random_masks(folder, seed, *, classes, count=5, void=0.2, present=None):
    """Label maps of unlike sizes; some classes never occur."""
    rng = np.random.default_rng(seed)
    masks = []
    for number in range(count):
        size = (7 + 5 * number, 31 - 3 * number)
        mask = rng.choice(present or classes, size).astype(np.uint8)
        mask[rng.random(size) < void] = 255
        save_palette(folder / f"image_{number}.png", mask)
        masks.append(mask)
    return masks


def scores(masks, truth, tmp_path, **options):
    assert evaluate(str(masks), against=str(truth), out=str(tmp_path / "out"), workers=1, **options) == 0
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def independent(predictions, truths, classes):
    """Confusion matrix by scikit-learn, and mIoU over the classes with a true pixel."""
    guess = np.concatenate([p[t != 255] for p, t in zip(predictions, truths, strict=True)])
    truth = np.concatenate([t[t != 255] for t in truths])
    matrix = confusion_matrix(truth, guess, labels=range(classes))
    with np.errstate(invalid="ignore"):
        iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    return matrix, iou, float(np.mean(iou[matrix.sum(1) > 0]))


@pytest.mark.parametrize(("classes", "count"), [("voc", 21), ("coco", 81)])
def test_masks_are_scored_to_the_last_bit(tmp_path, classes, count):
    truths = random_masks(tmp_path / "truth", 1, classes=count, present=[0, 1, 3, 7, count - 1])
    guesses = random_masks(tmp_path / "masks", 2, classes=count, void=0.0)
    found = scores(tmp_path / "masks", tmp_path / "truth", tmp_path, classes=classes)
    matrix, iou, mean = independent(guesses, truths, count)
    assert found["confusion"] == matrix.tolist()
    assert found["miou"] == mean
    for number, value in enumerate(found["iou"].values()):
        assert value is None if matrix[number].sum() == 0 else value == iou[number]
    assert "left out of the mean" in found["absent_rule"]
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert len(rows) == count + 1
    assert float(rows[-1]["iou"]) == mean
    assert int(rows[3]["true_pixels"]) == matrix[3].sum()
    assert int(rows[3]["predicted_pixels"]) == matrix[:, 3].sum()
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert min(picture.size) > count * 10


def test_the_truth_scores_one(tmp_path, capsys):
    random_masks(tmp_path / "truth", 1, classes=21, void=0.0)
    assert scores(tmp_path / "truth", tmp_path / "truth", tmp_path)["miou"] == 1.0
    assert "mIoU 100.00 over 21 classes, 5 images" in capsys.readouterr().out


def test_masks_eroded_by_three_pixels(tmp_path):
    truths, eroded = [], []
    for number in range(4):
        truth = label_map(number, [number, 7, 19], (50, 64))
        objects = [binary_erosion(truth == value, iterations=3) * value for value in (number + 1, 8, 20)]
        eroded.append(np.sum(objects, 0).astype(np.uint8))
        truths.append(truth)
        save_palette(tmp_path / "truth" / f"{number}.png", truth)
        save_palette(tmp_path / "masks" / f"{number}.png", eroded[-1])
    found = scores(tmp_path / "masks", tmp_path / "truth", tmp_path)
    matrix, _, mean = independent(eroded, truths, 21)
    assert found["confusion"] == matrix.tolist()
    assert found["miou"] == mean
    assert 0.3 < mean < 0.9


def test_workers_change_nothing(tmp_path):
    for name, seed in (("truth", 1), ("masks", 2)):
        random_masks(tmp_path / name, seed, classes=21, count=8, void=0.0)
    one = scores(tmp_path / "masks", tmp_path / "truth", tmp_path)
    assert (
        evaluate(str(tmp_path / "masks"), against=str(tmp_path / "truth"), workers=2, out=str(tmp_path / "b"))
        == 0
    )
    assert json.loads((tmp_path / "b" / "scores.json").read_text()) == one


def test_predicted_void_is_refused_unless_told(tmp_path):
    truths = random_masks(tmp_path / "truth", 1, classes=21)
    guesses = random_masks(tmp_path / "masks", 2, classes=21)
    with pytest.raises(
        DataError, match=r"image_0\.png leaves \d+ pixels void where the truth has a class; set void"
    ):
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path)
    matrix, _, _ = independent([np.where(g == 255, 0, g) for g in guesses], truths, 21)
    assert (
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path, void="background")["confusion"]
        == matrix.tolist()
    )
    known = [np.where(g == 255, 255, t) for g, t in zip(guesses, truths, strict=True)]
    matrix, _, _ = independent(guesses, known, 21)
    assert (
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path, void="ignore")["confusion"]
        == matrix.tolist()
    )


def clip_es_labels(keys, maps, background):
    """CLIP-ES's ``eval_cam.py`` as its description says: background first, arg max, map to labels."""
    kind, value = background.split()
    maps = maps.astype(np.float64)
    score = (1 - maps.max(0)) ** float(value) if kind == "power" else np.full(maps.shape[1:], float(value))
    return np.concatenate([[0], keys + 1])[np.concatenate([score[None], maps]).argmax(0)].astype(np.uint8)


def test_maps_are_scored_under_every_background(tmp_path, capsys):
    rng = np.random.default_rng(3)
    truths = random_masks(tmp_path / "truth", 1, classes=21)
    stored = []
    for number, truth in enumerate(truths):
        keys = rng.permutation(20)[: 1 + number % 3]
        maps = rng.random((len(keys), *truth.shape)).astype(np.float16)
        maps[0, :2] = np.float16(0.5)  # a tie with power 1
        write_clip_es(tmp_path / "maps" / f"image_{number}.npy", keys, maps)
        stored.append((keys, maps))
    found = scores(tmp_path / "maps", tmp_path / "truth", tmp_path)
    names = [f"power {power:g}" for power in POWERS] + [f"threshold {level:g}" for level in THRESHOLDS]
    assert list(found["sweep"]) == names
    best = 0.0
    for name in names:
        guesses = [clip_es_labels(*maps, name) for maps in stored]
        matrix, _, mean = independent(guesses, truths, 21)
        assert found["sweep"][name] == mean, name
        best = max(best, mean)
        if name == "power 1":
            assert found["miou"] == mean
            assert found["confusion"] == matrix.tolist()
    assert found["background"] == "power 1"
    assert found["tuned_on_truth"]["miou"] == best
    assert "not a fair score" in found["tuned_on_truth"]["note"]
    printed = capsys.readouterr().out
    assert "power 1, chosen without the truth" in printed
    assert "tuned on the truth" in printed
    chosen = scores(tmp_path / "maps", tmp_path / "truth", tmp_path, power=3.5, powers=[2.0], thresholds=[])
    assert list(chosen["sweep"]) == ["power 3.5", "power 2"]
    assert chosen["miou"] == chosen["sweep"]["power 3.5"]


@given(st.floats(0.2, 12), st.floats(0, 1))
def test_a_power_of_the_background_is_a_level_of_the_largest_map(power, value):
    level = Background.power(power).level
    if abs(value - level) > 1e-9:
        assert ((1 - value) ** power >= value) == (value <= level)


def test_images_without_maps_are_background(tmp_path):
    random_masks(tmp_path / "truth", 1, classes=21, count=1)
    write_clip_es(tmp_path / "maps" / "image_0.npy", np.zeros(0, np.int64), np.zeros((0, 7, 31), np.float16))
    found = scores(tmp_path / "maps", tmp_path / "truth", tmp_path)
    assert np.array(found["confusion"])[:, 1:].sum() == 0
    assert np.array(found["confusion"]).sum() > 0


def test_a_list_names_what_must_be_there(tmp_path, capsys):
    for name, seed in (("truth", 1), ("masks", 2)):
        random_masks(tmp_path / name, seed, classes=21, void=0.0)
    (tmp_path / "masks" / "image_3.png").unlink()
    assert scores(tmp_path / "masks", tmp_path / "truth", tmp_path)["images"] == 4
    assert "4 images scored; 1 further truths have no prediction" in capsys.readouterr().out
    (tmp_path / "val.txt").write_text("image_1\nimage_3\n")
    with pytest.raises(DataError, match=r"nothing to score for 1 images: .*image_3\.png missing"):
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path, ids=str(tmp_path / "val.txt"))
    (tmp_path / "val.txt").write_text("image_1\nimage_2\n")
    assert (
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path, ids=str(tmp_path / "val.txt"))["images"] == 2
    )
    (tmp_path / "truth" / "image_2.png").unlink()
    with pytest.raises(DataError, match=r"no truth for 1 images: .*image_2\.png missing"):
        scores(tmp_path / "masks", tmp_path / "truth", tmp_path)


def test_numbers_of_classes_without_names(tmp_path):
    random_masks(tmp_path / "truth", 1, classes=4)
    random_masks(tmp_path / "masks", 2, classes=4, void=0.0)
    found = scores(tmp_path / "masks", tmp_path / "truth", tmp_path, num_classes=4)
    assert list(found["iou"]) == ["background", "class 1", "class 2", "class 3"]


def test_what_cannot_be_scored_is_named(tmp_path):
    truth, masks = tmp_path / "truth", tmp_path / "masks"
    random_masks(truth, 1, classes=21, count=2)
    with pytest.raises(ConfigurationError, match=r"masks='.*masks' is no folder"):
        scores(masks, truth, tmp_path)
    masks.mkdir()
    with pytest.raises(ConfigurationError, match=r"neither \.png nor \.npy"):
        scores(masks, truth, tmp_path)
    save_palette(masks / "image_0.png", np.full((7, 30), 3, np.uint8))
    with pytest.raises(DataError, match=r"image_0\.png has 7 x 30 pixels \(H x W\), its truth .* 7 x 31"):
        scores(masks, truth, tmp_path)
    save_palette(masks / "image_0.png", np.full((7, 31), 21, np.uint8))
    with pytest.raises(DataError, match="21"):
        scores(masks, truth, tmp_path)
    maps = tmp_path / "maps"
    write_clip_es(maps / "image_0.npy", np.array([20]), np.zeros((1, 7, 31), np.float16))
    with pytest.raises(DataError, match="a map of class 20; there are 20 classes"):
        scores(maps, truth, tmp_path)
    write_clip_es(masks / "image_0.npy", np.array([2]), np.zeros((1, 7, 31), np.float16))
    with pytest.raises(ConfigurationError, match=r"both \.png and \.npy"):
        scores(masks, truth, tmp_path)
    for wrong in ({"power": 0.0}, {"thresholds": [1.0]}, {"num_classes": 1}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            scores(maps, truth, tmp_path, **wrong)
    save_palette(truth / "image_0.png", np.full((7, 31), 255, np.uint8))
    write_clip_es(maps / "image_0.npy", np.array([2]), np.zeros((1, 7, 31), np.float16))
    with pytest.raises(DataError, match="every pixel is void"):
        scores(maps, truth, tmp_path)

"""Files of predictions, and the archive for the VOC server."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpl_lightning.artifacts import write_mask
from vpl_lightning.errors import DataError
from vpl_lightning.predictions import PredictionSpec, PredictionWriter, write_server_archive


def random_prediction(seed: int = 0, classes: int = 21) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    picture = generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    probabilities = generator.dirichlet(np.ones(classes), (9, 13)).transpose(2, 0, 1).astype(np.float32)
    return picture, probabilities.argmax(0).astype(np.uint8), probabilities


def test_mask_alone(tmp_path: Path):
    picture, labels, probabilities = random_prediction()
    PredictionWriter(tmp_path).write("2008_000001", picture, labels, probabilities)
    assert [path.name for path in tmp_path.iterdir()] == ["2008_000001.png"]
    with Image.open(tmp_path / "2008_000001.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.array(mask), labels)
        assert mask.getpalette()[3:6] == [128, 0, 0]


def test_soft_scores_and_overlays(tmp_path: Path):
    picture, labels, probabilities = random_prediction()
    writer = PredictionWriter(tmp_path, PredictionSpec(soft=True, overlays=True))
    writer.write("a", picture, labels, probabilities)
    with np.load(tmp_path / "soft" / "a.npz", allow_pickle=False) as stored:
        assert stored["probabilities"].dtype == np.float16
        np.testing.assert_allclose(stored["probabilities"], probabilities, atol=1e-3)
    with Image.open(tmp_path / "overlays" / "a.png") as overlay:
        pixels = np.array(overlay)
    np.testing.assert_array_equal(pixels[labels == 0], picture[labels == 0])
    assert (pixels[labels != 0] != picture[labels != 0]).any(1).mean() > 0.9
    assert not list(tmp_path.rglob("*.partial"))


def test_server_archive(tmp_path: Path):
    expected = {}
    for index in range(3):
        name = f"2012_00000{index}"
        _, labels, _ = random_prediction(index)
        write_mask(tmp_path / f"{name}.png", labels)
        expected[f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png"] = labels
    path = write_server_archive(tmp_path)
    with tarfile.open(path) as archive:
        assert archive.getnames() == sorted(expected)
        for name, labels in expected.items():
            with Image.open(archive.extractfile(name)) as mask:
                np.testing.assert_array_equal(np.array(mask), labels)
    first = path.read_bytes()
    assert write_server_archive(tmp_path).read_bytes() == first
    one = write_server_archive(tmp_path, ["2012_000001"], path=tmp_path / "one.tar.gz")
    with tarfile.open(one) as archive:
        assert len(archive.getnames()) == 1


def test_server_archive_refuses_what_the_server_would(tmp_path: Path):
    with pytest.raises(DataError, match="no masks"):
        write_server_archive(tmp_path)
    write_mask(tmp_path / "x.png", np.full((2, 2), 255, np.uint8))
    with pytest.raises(DataError, match="label 255"):
        write_server_archive(tmp_path)
    with pytest.raises(DataError, match=r"missing\.png"):
        write_server_archive(tmp_path, ["missing"])
    assert not list(tmp_path.glob("*.tar.gz"))

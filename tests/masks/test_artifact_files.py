"""Files: whole or absent, recognised by fingerprint, read back exactly, refused by name when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vpl_lightning import artifacts
from vpl_lightning.artifacts import (
    Manifest,
    atomic_path,
    atomic_write,
    fingerprint,
    maps_fingerprint,
    mask_fingerprint,
    read_maps,
    read_mask,
    read_prototypes,
    remove_leftovers,
    voc_palette,
    write_maps,
    write_mask,
    write_prototypes,
)
from vpl_lightning.artifacts import atomic as atomic_module
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.crf import CRFConfig

SETTINGS = {"targets": {"mode": "prod", "phi": 0.4}, "classes": ["cat", "dog"], "version": 1}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.bin"
    atomic_write(path, b"old", sync=True)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:  # noqa: PT012
        partial.write_bytes(b"ne")
        assert partial.parent == path.parent
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch):
    program = "import os; print(os.getpid())"
    dead = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    names = {
        "dead": f".a.png.{atomic_module._HOST}-{dead}-0.partial",
        "ours": f".b.png.{atomic_module._HOST}-{os.getpid()}-0.partial",
        "init": f".c.png.{atomic_module._HOST}-1-0.partial",
        "elsewhere": ".d.png.other-host-1-0.partial",
    }
    for name in names.values():
        (tmp_path / name).touch()
    (tmp_path / "kept.png").touch()
    (tmp_path / ".hidden").touch()
    assert remove_leftovers(tmp_path) == 1
    assert not (tmp_path / names["dead"]).exists()
    old = tmp_path / names["elsewhere"]
    os.utime(old, (0, 0))
    assert remove_leftovers(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {names["ours"], names["init"], "kept.png", ".hidden"}

    def foreign(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", foreign)
    assert remove_leftovers(tmp_path) == 0
    assert not atomic_module._abandoned(tmp_path / "vanished.partial")


def test_fingerprints_depend_on_content_alone():
    @dataclass
    class Own:
        b: tuple[int, ...] = (1, 2)
        a: Path = Path("x/y")

    same = {"a": "x/y", "b": [1, 2]}
    assert fingerprint(Own()) == fingerprint(same) == fingerprint({"b": (np.int64(1), 2), "a": "x/y"})
    assert (
        len({fingerprint(each) for each in (same, {**same, "b": [2, 1]}, {**same, "b": [1.5, 2]}, {})}) == 4
    )
    assert fingerprint(CRFConfig()) != fingerprint(CRFConfig(iterations=9))
    assert (
        fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )  # sha256 of "{}"


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), b"bytes", torch.zeros(1)])
def test_what_has_no_canonical_form_is_named(value):
    with pytest.raises(ConfigurationError, match=r"settings\.targets\.mode\[1\]="):
        fingerprint({"targets": {"mode": [0, value]}})


def test_manifest_explains_what_changed(tmp_path):
    assert Manifest.match_or_explain(tmp_path, SETTINGS) == f"{tmp_path} holds no manifest.json yet"
    Manifest(SETTINGS).write(tmp_path)
    assert Manifest.match_or_explain(tmp_path, SETTINGS) is None
    assert Manifest.match_or_explain(tmp_path, SETTINGS, complete=True) == "an earlier run did not finish"
    Manifest.mark_complete(tmp_path)
    assert Manifest.match_or_explain(tmp_path, dict(reversed(SETTINGS.items())), complete=True) is None
    assert Manifest.read(tmp_path).fingerprint == fingerprint(SETTINGS)

    changed = {**SETTINGS, "targets": {"mode": "avg", "phi": 0.4}}
    assert Manifest.match_or_explain(tmp_path, changed) == "targets.mode changed from 'prod' to 'avg'"
    added = {**SETTINGS, "seed": 3}
    assert Manifest.match_or_explain(tmp_path, added) == "seed changed from nothing to 3"
    del added["classes"], added["version"]
    assert Manifest.match_or_explain(tmp_path, added | {"targets": {}}) == (
        "targets.mode changed from 'prod' to nothing, targets.phi changed from 0.4 to nothing, "
        "seed changed from nothing to 3 and 2 more"
    )
    many = {**SETTINGS, "classes": ["zebra"] * 30}
    assert len(Manifest.match_or_explain(tmp_path, many)) < 200


def test_an_int_is_not_a_truth_value(tmp_path):
    Manifest({"flip": True}).write(tmp_path)
    assert Manifest.match_or_explain(tmp_path, {"flip": 1}) == "flip changed from True to 1"


def test_a_broken_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no manifest"):
        Manifest.mark_complete(tmp_path)
    (tmp_path / "manifest.json").write_text('{"settings": ')
    with pytest.raises(DataError, match="delete it"):
        Manifest.read(tmp_path)
    assert "delete it" in Manifest.match_or_explain(tmp_path, SETTINGS)


def test_palette_is_the_devkits():
    palette = voc_palette()
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
    }
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(palette[label].tolist()) for label in known} == known
    assert len({tuple(colour) for colour in palette.tolist()}) == 256
    palette[0] = 9
    assert voc_palette()[0, 0] == 0


@pytest.mark.parametrize("palette", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_masks_come_back_as_indices(tmp_path, palette, kind):
    labels = np.random.default_rng(0).integers(0, 256, (13, 17)).astype(kind)
    path = tmp_path / "sub" / "mask.png"
    write_mask(path, labels, palette=palette, fingerprint="f" * 64)
    read = read_mask(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, labels)
    assert mask_fingerprint(path) == "f" * 64
    with Image.open(path) as image:
        assert image.mode == ("P" if palette else "L")
        if palette:
            np.testing.assert_array_equal(np.array(image.convert("RGB")), voc_palette()[labels])


def test_masks_of_few_labels_keep_eight_bits(tmp_path):
    write_mask(tmp_path / "m.png", np.zeros((5, 6), np.uint8))
    header = (tmp_path / "m.png").read_bytes()[16:26]
    assert header[8:] == bytes([8, 3])  # bit depth, colour type "palette"
    assert mask_fingerprint(tmp_path / "m.png") is None


def test_wrong_labels_and_files_are_named(tmp_path):
    for labels in (np.array([[256]]), np.array([[-1]])):
        with pytest.raises(DataError, match=r"0\.\.255"):
            write_mask(tmp_path / "m.png", labels)
    path = tmp_path / "m.png"
    with pytest.raises(DataError, match="no such mask"):
        read_mask(path)
    write_mask(path, np.array([[0, 20, 21, 255]]))
    with pytest.raises(DataError, match=r"labels \[21\] are neither below 21 nor 255"):
        read_mask(path, num_classes=21)
    assert read_mask(path, num_classes=22).tolist() == [[0, 20, 21, 255]]
    for mode, word in (("RGB", "mode RGB"), ("1", "one-bit"), ("I;16", "mode I;16")):
        Image.new(mode, (4, 4)).save(path)
        with pytest.raises(DataError, match=word):
            read_mask(path)


def test_masks_that_are_cut_short_do_not_count(tmp_path):
    path = tmp_path / "m.png"
    write_mask(path, np.random.default_rng(0).integers(0, 9, (60, 60)), fingerprint="abc")
    whole = path.read_bytes()
    for end in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert mask_fingerprint(path) is None
        if end < len(whole) - 1:
            with pytest.raises(DataError, match="not a readable image"):
                read_mask(path)
    assert mask_fingerprint(tmp_path / "absent.png") is None


def test_maps_come_back_in_half_precision_and_identical_bytes(tmp_path):
    rng = np.random.default_rng(1)
    maps = {"classes": np.array([4, 1]), "cams": rng.random((2, 3, 5)), "affinity": rng.random((2, 6, 10))}
    for name in "ab":
        write_maps(tmp_path / name, **maps, size=(48, 80), fingerprint="123")
    read = read_maps(tmp_path / "a")
    assert (read.classes.tolist(), read.size) == ([4, 1], (48, 80))
    np.testing.assert_array_equal(read.cams, maps["cams"].astype(np.float16))
    np.testing.assert_array_equal(read.affinity, maps["affinity"].astype(np.float16))
    assert maps_fingerprint(tmp_path / "a") == "123"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < 1000


def test_maps_that_are_cut_short_do_not_count(tmp_path):
    path = tmp_path / "m.safetensors"
    write_maps(path, classes=np.array([1]), cams=np.ones((1, 2, 2)), affinity=np.ones((1, 2, 2)), size=(8, 8))
    assert maps_fingerprint(path) is None
    assert read_maps(path).size == (8, 8)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"\xff" * 30, whole + b"x"):
        path.write_bytes(content)
        assert maps_fingerprint(path) is None
        with pytest.raises(DataError, match="not a file of localisation maps"):
            read_maps(path)


def test_prototypes_come_back_with_what_was_said_about_them(tmp_path):
    prototypes = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    about = {"classes": json.dumps(["cat", "dog"]), "fingerprint": "abc"}
    write_prototypes(tmp_path / "a", prototypes, metadata=about)
    write_prototypes(tmp_path / "b", prototypes, metadata=dict(reversed(about.items())))
    stored = read_prototypes(tmp_path / "a")
    assert stored.metadata == about
    assert stored.prototypes.dtype == torch.float32
    torch.testing.assert_close(stored.prototypes, prototypes.detach().float(), rtol=0, atol=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_files_are_no_prototypes(tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    for name in ("other", "text", "absent"):
        with pytest.raises(DataError, match=f"{name}: not a file of prototypes"):
            read_prototypes(tmp_path / name)


def test_names_are_complete():
    assert all(getattr(artifacts, name) for name in artifacts.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        artifacts.nonsense  # noqa: B018

"""``vpl prepare folder``: the check of own photographs."""

import json

import pytest

from tests.archives import (
    label_map,
    make_folder,
    picture,
    save_palette,
    save_photo,
    truncate,
)
from vpl_lightning.cli.prepare import prepare_folder
from vpl_lightning.errors import ConfigurationError


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

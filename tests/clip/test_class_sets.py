"""The shipped class lists, and what users may write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from vpl_lightning.clip import ClassSet, class_set, named_templates, shipped_class_sets
from vpl_lightning.errors import ConfigurationError

VOC_NAMES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def write(path: Path, value: Any) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


def test_voc() -> None:
    voc = class_set("voc")
    assert list(voc.foreground) == VOC_NAMES
    assert voc.num_classes == 21
    changed = {
        name: prompt for name, prompt in zip(voc.foreground, voc.prompts, strict=True) if name != prompt
    }
    assert changed == {
        "bird": "bird avian",
        "chair": "chair seat",
        "person": "person with clothes,people,human",
        "tvmonitor": "tvmonitor screen",
    }
    assert len(voc.background) == 25
    assert (voc.background[0], voc.background[13], voc.background[-1]) == ("ground", "keyboard", "sign")
    assert voc.templates == ("a clean origami {}.",)
    assert voc.box_threshold == 0.4


def test_coco() -> None:
    coco = class_set("coco")
    assert coco.num_classes == 81
    assert len(coco.prompts) == 80
    spots = {0: "person", 11: "stop sign", 27: "tie", 56: "chair", 62: "tv", 79: "toothbrush"}
    assert {index: coco.foreground[index] for index in spots} == spots
    texts = {
        0: "person with clothes,people,human",
        3: "motorbike",
        24: "backpack,bag",
        27: "necktie",
        31: "snowboard",
        35: "glove",
        44: "dessertspoon",
        57: "sofa",
        65: "remote control",
        78: "hairdrier,blowdrier",
    }
    assert {index: coco.prompts[index] for index in texts} == texts
    assert coco.box_threshold == 0.7
    assert set(class_set("voc").background) - set(coco.background) == {"keyboard", "sign"}
    assert len(coco.background) == 23


def test_verbatim_spelling_of_clip_es_is_a_variant() -> None:
    verbatim, coco = class_set("coco:clip_es_verbatim"), class_set("coco")
    assert verbatim.name == "coco:clip_es_verbatim"
    differing = [pair for pair in zip(verbatim.prompts, coco.prompts, strict=True) if pair[0] != pair[1]]
    assert differing == [("sknowboard", "snowboard")]
    with pytest.raises(ConfigurationError, match="no variant 'funny'; it has: clip_es_verbatim"):
        class_set("coco:funny")


@pytest.mark.parametrize("name", shipped_class_sets())
def test_shipped_sets_are_sound(name: str) -> None:
    classes = class_set(name)
    assert classes.name == name
    assert ClassSet.from_dict(classes.to_dict()) == classes
    assert class_set(classes) is classes
    assert not {*classes.background} & {*classes.foreground, *classes.prompts}


def test_named_templates() -> None:
    named = named_templates()
    assert named["clip_es"] == ("a clean origami {}.",)
    assert named["single"] == ("a photo of a {}.",)
    assert [text.format("cat") for text in named["imagenet7"]] == [
        f("cat") for f in SIMPLE_IMAGENET_TEMPLATES
    ]
    assert [text.format("cat") for text in named["imagenet80"]] == [
        f("cat") for f in OPENAI_IMAGENET_TEMPLATES
    ]
    voc = class_set("voc")
    assert voc.with_templates("imagenet7").templates == named["imagenet7"]
    assert voc.with_templates("one {} only").templates == ("one {} only",)
    assert voc.with_templates(["a {}", "b {}"]).templates == ("a {}", "b {}")
    assert voc.with_templates("single").prompts == voc.prompts
    with pytest.raises(
        ConfigurationError, match="'best' is unknown; choose one of clip_es, single, imagenet7"
    ):
        voc.with_templates("best")


def test_own_classes(tmp_path: Path) -> None:
    mine = class_set(str(write(tmp_path / "pets.yaml", {"foreground": ["cat", "wall"]})))
    assert mine.name == "pets"
    assert mine.prompts == mine.foreground == ("cat", "wall")
    assert "wall" not in mine.background
    assert len(mine.background) == 24
    assert mine.templates == ("a clean origami {}.",)
    assert mine.box_threshold == 0.4
    value = {
        "name": "farm",
        "foreground": ["cow", "hen"],
        "synonyms": {"hen": ["hen", "chicken"]},
        "background": ["hay"],
        "templates": ["a {}", "the {}"],
        "box_threshold": 0,
    }
    farm = ClassSet.from_yaml(write(tmp_path / "b.yaml", value))
    assert farm == ClassSet("farm", ("cow", "hen"), ("cow", "hen,chicken"), ("hay",), ("a {}", "the {}"), 0.0)
    borrowed = ClassSet.from_dict({"foreground": ["cow"], "background": "coco", "prompts": ["a cow"]})
    assert borrowed.background == class_set("coco").background
    assert borrowed.prompts == ("a cow",)
    assert ClassSet.from_dict({"foreground": ["cow"], "background": []}).background == ()


GOOD = {"foreground": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"classes": ["cat"]}, "unknown key classes; the keys are name, foreground"),
        ({"name": "x"}, "no key 'foreground'"),
        ({"foreground": "cat"}, "foreground is 'cat'; write a list"),
        ({"foreground": []}, "foreground is empty"),
        ({"foreground": ["cat", False]}, "foreground holds False, .* put it in quotes"),
        ({"foreground": ["cat", " "]}, "foreground holds ' '"),
        ({"foreground": ["cat", "cat"]}, "foreground names cat twice"),
        (GOOD | {"background": ["sky", "sky"]}, "background names sky twice"),
        (GOOD | {"background": "pascal"}, "background is 'pascal'; list the words, or borrow those of .*voc"),
        (GOOD | {"prompts": ["cat"]}, "prompts has 1 texts for 2"),
        (GOOD | {"prompts": ["cat", "dog"], "synonyms": {"cat": "kitten"}}, "not both"),
        (GOOD | {"synonyms": ["kitten"]}, r"synonyms is \['kitten'\]; write a mapping"),
        (GOOD | {"synonyms": {"cow": "calf"}}, "synonyms names 'cow', which is not among"),
        (GOOD | {"templates": ["a photo"]}, "templates holds 'a photo'; write {} once"),
        (GOOD | {"templates": ["{} or {}"]}, "write {} once"),
        (GOOD | {"templates": []}, "templates is empty"),
        (GOOD | {"box_threshold": 1.5}, r"box_threshold is 1.5; choose a number in \[0, 1\)"),
        (GOOD | {"box_threshold": "low"}, "box_threshold is 'low'"),
        (["cat"], "holds list; write a mapping"),
    ],
)
def test_wrong_yaml_names_key_value_and_fix(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        class_set(str(write(tmp_path / "own.yaml", value)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'cityscapes' is neither .*\(coco, .*voc\) nor a YAML file"
    ):
        class_set("cityscapes")
    with pytest.raises(ConfigurationError, match="No such file"):
        ClassSet.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("foreground: [cat")
    with pytest.raises(ConfigurationError, match="is not YAML"):
        class_set(str(tmp_path / "bad.yaml"))

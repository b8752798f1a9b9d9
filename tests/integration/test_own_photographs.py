"""The README's path for own photographs, command by command, and what people get wrong on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.archives import label_map, picture, save_palette, save_photo, truncate
from tests.integration.runs import PROJECT
from tests.models import tiny_clip
from tests.openai_style import openai_style
from vpl_lightning.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
SECTION = (PROJECT / "README.md").read_text().split("## Your own photographs")[1].split("\n## ")[0]
COMMANDS = [words.split()[1:] for words in re.findall(r"`(vpl [^`]+)`", SECTION)]
FEW_STEPS = [
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
    "--model.localiser.mask_workers=0",
    "--model.localiser.recipe.solver.steps=5",
    "--data.crop_size=64",
]
TAGS = {
    f"photo_{n}.jpg": [["dog"], ["boat"], ["Flying Kite", "dog"], ["boat", "kite"]][n % 4] for n in range(12)
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README asks for, and the current one."""
    for seed, name in enumerate(TAGS):
        save_photo(tmp_path / "photos" / name, picture(seed), ["rgb", "turned"][seed % 2])
        save_photo(tmp_path / "new_photos" / f"new_{name}", picture(100 + seed, (30, 50)))
    write_tags(tmp_path, [f"{name},{';'.join(tags)}" for name, tags in TAGS.items()])
    text = re.search(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    assert text
    (tmp_path / "classes.yaml").write_text(text[1])
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    model = openai_style(tiny_clip(patch_size=16, image_size=64).state_dict(), patch_size=16, image_size=64)
    torch.save(model.state_dict(), tmp_path / "ViT-B-16.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vpl"])
    return tmp_path


def write_tags(folder: Path, rows: list[str], header: str = "file,tags") -> None:
    (folder / "photos" / "tags.csv").write_text("\n".join([header, *rows]) + "\n")


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as mask:
            assert mask.mode == "P"
            assert set(np.unique(np.array(mask))) <= {0, 1, 2, 3, 255}
            found[path.stem] = (mask.height, mask.width)
    return found


def test_readme_is_ten_lines_of_three_commands() -> None:
    path = SECTION.split("\n\n")[1]
    assert len(path.splitlines()) == 10
    assert [words[0] for words in COMMANDS] == ["prepare", "fit", "predict"]


def test_commands_of_the_readme_give_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, fit, predict = COMMANDS
    assert main(prepare) == 0
    assert "tags: dog 6, boat 6, kite 6" in capsys.readouterr().out
    assert main([*fit, *FEW_STEPS]) == 0
    upright = {Path(name).stem: [(40, 60), (60, 40)][n % 2] for n, name in enumerate(TAGS)}
    assert sizes(folder / "runs" / "folder" / "pseudo_masks") == upright
    assert main(predict) == 0
    assert sizes(folder / "runs" / "folder" / "predictions") == {f"new_{name}": (30, 50) for name in upright}


def test_masks_of_a_few_and_tags_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, fit, _ = COMMANDS
    (folder / "photos" / "tags.json").write_text(json.dumps(TAGS))
    save_palette(folder / "masks" / "photo_0.png", label_map(1, [0]))
    prepare, fit = ([word.replace("tags.csv", "tags.json") for word in words] for words in (prepare, fit))
    assert main([*prepare, "--masks", "masks"]) == 0
    assert "no fault in 12 images" in capsys.readouterr().out
    assert main([*fit, *FEW_STEPS, "--data.masks", "masks"]) == 0
    report = json.loads((folder / "runs" / "folder" / "report.json").read_text())
    assert report["decoder"]["miou"] is not None


MISTAKES = {
    "column": (["photo_0.jpg,dog"], "file,word", "needs a column 'file' and a column 'tags'"),
    "unknown tag": (["photo_0.jpg,dgo"], "file,tags", "1 unknown tags"),
    "missing file": (
        ["photo_0.jpg,dog", "photo_99.jpg,dog"],
        "file,tags",
        "names 1 files that are not in photos",
    ),
    "no tag": (["photo_0.jpg,dog", "photo_1.jpg,"], "file,tags", "1 of 2 images have no tag: photo_1"),
    "twice": (["photo_0.jpg,dog", "photo_0.jpg,boat"], "file,tags", "1 rows repeat a name: photo_0.jpg"),
    "comma": (["photo_0.jpg,dog,boat"], "file,tags", "line 2: 1 cells too many"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_tags_are_named(folder: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    rows, header, expected = MISTAKES[mistake]
    write_tags(folder, rows, header)
    assert main(COMMANDS[1]) == 2
    assert expected in capsys.readouterr().err
    assert main(COMMANDS[0]) != 0


def test_a_wrong_class_name_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "classes.yaml").write_text("foreground: [dog, boat]\nsynonyms: {kites: [kite]}\n")
    assert main(COMMANDS[0]) == 2
    assert "synonyms names 'kites', which is not among the foreground classes" in capsys.readouterr().err


def test_untagged_and_damaged_photographs_are_left_out_aloud(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tags(folder, ["photo_0.jpg,dog", "photo_1.jpg,", "photo_2.jpg,boat", "photo_4.jpg,dog"])
    truncate(folder / "photos" / "photo_2.jpg")
    assert main([*COMMANDS[1], *FEW_STEPS, "--data.on_bad_image", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 images have no tag: photo_1; leaving them out" in printed
    assert "leaving out 1 of 3 images" in printed
    assert set(sizes(folder / "runs" / "folder" / "pseudo_masks")) == {"photo_0", "photo_4"}

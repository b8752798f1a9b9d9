"""Wrong input is answered with an exit code and a line that names the key, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.runs import PROJECT, SHAPES
from tests.models import tiny_clip
from vpl_lightning.cli import main
from vpl_lightning.cli.complaints import distil

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where both its caller and the process have arguments."""
    monkeypatch.setattr("sys.argv", ["vpl"])


def complaint(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its last line."""
    try:
        code = main(words)
    except SystemExit as error:
        code = int(error.code or 0)
    text = capfd.readouterr().err
    assert "Traceback" not in text
    return code, text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--model.decoder.widht=3",), "did you mean width"),
        (("--model.localiser.recipe.objective.tau_image=-1",), "tau_image=-1.0 must be positive"),
        (("--model.localiser.recipe.targets.mode=nope",), "mode"),
        (
            ("--model.localiser.generator.name=nope",),
            "unknown baseline 'nope'; available: clip_cpal, clip_es",
        ),
        (("--model.localiser.generator.options={foo: 1}",), "has no option foo"),
        (("--model.localiser.encoder.checkpoint=nowhere.pt",), "nowhere.pt"),
        (
            ("--model.localiser.encoder.pretrained=openai",),
            "encoder.pretrained='openai' needs encoder.open_clip",
        ),
        (("--data.train_images=0",), "train_images=0 must be at least 1"),
        (("--data.classes=voc",), "data.classes"),
        (("--trainer.max_epochs=x",), "trainer.max_epochs"),
        (("--modl=3",), "--modl=3"),
    ],
)
def test_wrong_settings_end_with_two(
    capfd: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    code, line = complaint(capfd, "fit", f"--config={SHAPES}", *words)
    assert code == 2
    assert expected in line


def test_wrong_commands_end_with_two(capfd: pytest.CaptureFixture[str]) -> None:
    code, line = complaint(capfd, "fitt")
    assert code == 2
    assert "unknown command 'fitt'" in line
    assert main([]) == 2
    capfd.readouterr()


def test_weights_of_the_wrong_geometry(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = tiny_clip().state_dict()
    state["visual.proj"] = state["visual.proj"][:-1]
    torch.save(state, tmp_path / "wrong.pt")
    encoder = f"--model.localiser.encoder={{checkpoint: {tmp_path / 'wrong.pt'}, quick_gelu: true}}"
    code, line = complaint(capfd, "fit", f"--config={SHAPES}", encoder)
    assert code == 2
    assert "visual.proj" in line


def test_missing_root_names_where_it_looked(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--model.encoder={checkpoint: null}", f"--data.root={tmp_path / 'nowhere'}")
    code, line = complaint(capfd, "fit", f"--config={PROJECT / 'configs' / 'voc_prototypes.yaml'}", *words)
    assert code == 2
    assert str(tmp_path / "nowhere") in line


def test_scoring_without_a_checkpoint(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, line = complaint(capfd, "test", f"--config={SHAPES}", f"--trainer.default_root_dir={tmp_path}")
    assert code == 2
    assert "run 'vpl fit' first" in line


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_configuration_parses_and_says_how_to_run_it(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert config.read_text().startswith(f"# vpl fit --config configs/{config.name}")
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert not stop.value.code
    assert "class_path" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--model.localiser.encoder.checkpoint=null", "checkpoint: null"),
        ("--model.localiser.encoder={checkpoint: null}", "checkpoint: null"),
        ("--model.localiser.encoder.quick_gelu=null", "quick_gelu: null"),
        ("--model.localiser.encoder.checkpoint=other.pt", "checkpoint: other.pt"),
        ("--model.prediction.folder=null", "folder: null"),
        ("--data.train_masks=null", "train_masks: null"),
        (
            "--model.localiser.generator.options={scales: [1.0, null]}",
            "scales:\n            - 1.0\n            - null",
        ),
    ],
)
def test_null_on_the_command_line_is_null(
    capfd: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={PROJECT / 'configs' / 'voc.yaml'}", word, "--print_config"])
    printed = capfd.readouterr().out
    assert expected in printed
    assert "None" not in printed


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "baselines" in capfd.readouterr().out
    assert main(["--version"]) == 0
    assert "vpl_lightning" in capfd.readouterr().out


def test_distil_keeps_keys_and_reasons() -> None:
    report = 'Parser key "a":\n  Does not validate against any of the Union subtypes\n  Errors:\n    - b=3 is too small'
    assert distil(report) == "a: b=3 is too small"
    assert distil("plain words") == "plain words"

"""Generators by name: lazy, collisions refused, broken plug-ins named and skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from vpl_baselines.dense_similarity import DenseSimilarity

from vpl_lightning import registry
from vpl_lightning.cli.baselines import list_baselines, survey
from vpl_lightning.cli.tools import run_tool
from vpl_lightning.errors import ConfigurationError, PluginError
from vpl_lightning.registry import GROUP, Registry, baselines, check_options

SHIPPED = ["clip_cpal", "clip_es", "dense_similarity", "external", "grad_cam"]


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets what installed packages declare."""

    def declare(**values: str | list[str]) -> Registry:
        found = [
            EntryPoint(name, value, GROUP)
            for name, own in values.items()
            for value in ([own] if isinstance(own, str) else own)
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])
        return Registry(GROUP)

    return declare


def test_the_shipped_generators_are_installed_as_anybodys() -> None:
    assert [name for name in baselines if name in SHIPPED] == SHIPPED
    assert "clip_es" in baselines
    assert "clip_se" not in baselines
    for name in SHIPPED:
        info = baselines.get(name).info
        assert info.paper
        assert info.origin
        assert info.licence


def test_listing_imports_no_plugin() -> None:
    probe = (
        "import sys; from vpl_lightning import baselines\n"
        "names = list(baselines); origin = baselines.origin(names[0])\n"
        "found = [m for m in sys.modules if m.startswith('vpl_baselines')]\n"
        "assert not found, found\n"
        "baselines.get('grad_cam'); assert 'vpl_baselines.grad_cam' in sys.modules\n"
        "assert 'vpl_baselines.external' not in sys.modules\n"
        "print(len(names), origin)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "vpl_baselines.clip_cpal:ClipCPAL"


def test_an_unknown_name_lists_the_known_ones(tiny_encoder) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown baseline 'clip_se'; available: .*clip_es, dense"):
        baselines.create("clip_se", encoder=tiny_encoder, classes="voc")


def test_options_are_checked(tiny_encoder) -> None:
    with pytest.raises(ConfigurationError, match="has no option threshold; it takes: box_threshold"):
        baselines.create("clip_es", encoder=tiny_encoder, classes="voc", threshold=0.4)
    with pytest.raises(ConfigurationError, match="'external' needs the option command"):
        baselines.create("external", encoder=tiny_encoder, classes="voc")


def test_a_constructor_that_takes_anything_gets_anything() -> None:
    class Open(DenseSimilarity):
        def __init__(self, encoder, classes, *, needed, **options) -> None:
            super().__init__(encoder, classes, **options)

    check_options("open", Open, {"needed": 1, "features": "final"})
    with pytest.raises(ConfigurationError, match="needs the option needed"):
        check_options("open", Open, {"features": "final"})


def test_in_process_registration(points, tiny_encoder) -> None:
    found = points()

    @found.register("mine")
    class Mine(DenseSimilarity):
        pass

    assert list(found) == ["mine"]
    assert found.get("mine") is Mine
    assert isinstance(found.create("mine", encoder=tiny_encoder, classes="voc", features="final"), Mine)
    assert found.register("mine")(Mine) is Mine, "a module that is imported again registers itself again"
    with pytest.raises(PluginError, match=r"'mine' is taken by .*test_registry:.*Mine; choose another"):
        found.register("mine")(DenseSimilarity)


def test_a_name_of_an_installed_package_is_taken(points) -> None:
    found = points(theirs="some_package.module:Theirs")
    with pytest.raises(PluginError, match=r"'theirs' is taken by some_package\.module:Theirs"):
        found.register("theirs")(DenseSimilarity)


def test_a_shipped_class_may_also_register_itself(points) -> None:
    found = points(dense_similarity="vpl_baselines.dense_similarity:DenseSimilarity")
    assert found.register("dense_similarity")(DenseSimilarity) is DenseSimilarity


BROKEN = {
    "absent": ("no_such_package:Thing", "cannot be imported: ModuleNotFoundError"),
    "function": ("json:dumps", "not a concrete CAMGenerator"),
    "abstract": ("vpl_lightning.cams:CAMGenerator", "not a concrete CAMGenerator"),
    "quitter": ("quitter:Thing", "cannot be imported: SystemExit"),
    "uninformed": ("uninformed:Thing", "an info that is no BaselineInfo"),
    "twice": (["one:Thing", "other:Thing"], "claimed by one:Thing and by other:Thing"),
}


@pytest.fixture
def mixed(points, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    (tmp_path / "quitter.py").write_text("raise SystemExit('needs a licence')")
    (tmp_path / "uninformed.py").write_text(
        "from vpl_baselines.grad_cam import GradCAM\nclass Thing(GradCAM):\n    info = {'paper': 'one'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sound = {"grad_cam": "vpl_baselines.grad_cam:GradCAM"}
    return points(**sound, **{name: value for name, (value, _) in BROKEN.items()})


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_says_why(mixed: Registry, name: str) -> None:
    with pytest.raises(PluginError, match=f"'{name}' .*{BROKEN[name][1]}"):
        mixed.get(name)


def test_broken_plugins_are_reported_and_skipped(mixed: Registry) -> None:
    usable, broken = survey(mixed)
    assert [row["name"] for row in usable] == ["grad_cam"]
    assert {row["name"] for row in broken} == set(BROKEN)
    for row in broken:
        assert BROKEN[row["name"]][1] in row["error"]


def test_the_command_prints_a_table_and_warns(
    mixed: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vpl_lightning.cli.baselines.baselines", mixed)
    assert list_baselines() == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["name", "paper", "origin", "licence"]
    assert [line.split()[0] for line in lines[2:]] == ["grad_cam"]
    assert "skipped 'absent'" in printed.err
    assert run_tool(["baselines", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["grad_cam"]["licence"] == "MIT"
    assert "ModuleNotFoundError" in rows["absent"]["error"]


def test_a_plugin_that_nobody_asked_for_may_be_broken(tmp_path) -> None:
    """Not even the default generator is imported before a configuration names it or leaves it to stand."""
    package = tmp_path / "vpl_baselines"
    for name in ("", "clip_es"):
        (package / name).mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "clip_es" / "__init__.py").write_text("raise ImportError('half installed')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from vpl_lightning.errors import PluginError\n"
        "from vpl_lightning.specs import GeneratorSpec\n"
        "from vpl_lightning.tasks import VisionPrototypeModule\n"
        "assert 'vpl_baselines' not in sys.modules\n"
        "try: VisionPrototypeModule()\n"
        "except PluginError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        "'clip_es' (vpl_baselines.clip_es:ClipES) cannot be imported: ImportError('half installed')"
        in done.stdout
    )

"""The order of the house: imports point down, light doors stay light, versions agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import vpl_lightning

PROJECT = Path(__file__).parents[1]
SOURCE = PROJECT / "src" / "vpl_lightning"
LEVELS = {
    "errors": 0,
    "structures": 0,
    "progress": 0,
    "functional": 1,
    "artifacts": 2,
    "archives": 3,
    "clip": 3,
    "masks": 3,
    "mask_worker": 4,
    "mask_stream": 5,
    "figures": 5,
    "metrics": 5,
    "decoder": 5,
    "cams": 5,
    "registry": 6,
    "testing": 6,
    "specs": 7,
    "store": 7,
    "inference": 7,
    "predictions": 7,
    "data": 7,
    "blocks": 8,
    "collect": 9,
    "plugin": 9,
    "tasks": 10,
    "report": 11,
    "method": 12,
    "cli": 13,
}
"""Storey of each module or package; it may import from its own and from those below."""
LIGHT = ("vpl_lightning", "vpl_lightning.registry", "vpl_lightning.plugin")
HEAVY = ("lightning", "jsonargparse", "open_clip", "wandb", "albumentations", "cv2", "pycocotools")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(
                [node.module]
                if node.module != "vpl_lightning"
                else [f"{node.module}.{a.name}" for a in node.names]
            )
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imported(path):
        assert not name.startswith("vpl_baselines"), f"{path} imports an adapter"
        if name.startswith("vpl_lightning.") and room(name) in LEVELS:
            assert LEVELS[room(name)] <= LEVELS[own], f"{own} imports {name} from above"


def heavy_modules_after(statement: str) -> set[str]:
    probe = f"import sys; {statement}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_doors_stay_light(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == set()


def test_the_probe_can_fail() -> None:
    assert heavy_modules_after("import jsonargparse") == {"jsonargparse"}


def test_citation_and_package_agree() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["version"] == vpl_lightning.__version__
    assert citation["preferred-citation"]["year"] == 2025
    assert f'version = "{vpl_lightning.__version__}"' in (PROJECT / "pyproject.toml").read_text()


def test_every_package_is_shipped() -> None:
    listed = (PROJECT / "pyproject.toml").read_text()
    for name, root in (("vpl_lightning", SOURCE), ("vpl_baselines", PROJECT / "baselines")):
        for init in root.rglob("__init__.py"):
            package = ".".join([name, *init.parent.relative_to(root).parts])
            assert f'"{package}",' in listed, f"pyproject.toml does not ship {package}"

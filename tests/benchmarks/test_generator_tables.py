"""The lists of configurations that become tables: what they hold, and that every entry runs as written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import generators
import prototypes

from vpl_lightning import baselines
from vpl_lightning.data import ShapesDataModule
from vpl_lightning.specs import EncoderSpec

BENCHMARKS = Path(generators.__file__).parent


def entries(name: str) -> list[dict]:
    return yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())


def test_table_4_crosses_sources_with_prompts() -> None:
    modules = [generators.build(entry, EncoderSpec()) for entry in entries("table4")]
    sources = [module.recipe.source for module in modules]
    assert sources == ["text", "text", "modify_gap", "modify_gap", "learnt", "learnt"]
    templates = [module.generator_spec.templates for module in modules]
    assert templates[::2] == ["single"] * 3
    assert templates[1] == templates[3] == templates[5]
    assert len(templates[1]) == 5


def test_every_generator_but_the_outside_one_has_both_rows() -> None:
    modules = [generators.build(entry, EncoderSpec()) for entry in entries("generators")]
    found = [(module.generator_spec.name, module.recipe.source) for module in modules]
    names = set(baselines) - {"external"}
    assert sorted(found) == sorted((name, source) for name in names for source in ("text", "learnt"))


@pytest.mark.parametrize("name", ["table4", "generators"])
def test_rows_are_compared_with_rows_of_the_same_list(name: str) -> None:
    listed = entries(name)
    rows = [entry["row"] for entry in listed]
    assert len(set(rows)) == len(rows)
    assert {entry["against"] for entry in listed if "against" in entry} <= set(rows)


def test_a_row_counts_wins_over_its_own_reference() -> None:
    tables = [{"a": {"raw": 1.0}, "b": {"raw": 5.0}, "b, more": {"raw": 4.0}}]
    lines = prototypes.summary(tables, {"b, more": "b"}).splitlines()
    assert lines[-2:] == ["| b | 5.0 |", "| b, more | 4.0 (0/1) |"]


def test_a_text_row_is_the_score_of_text() -> None:
    data = ShapesDataModule(train_images=6, val_images=1, test_images=3)
    text, learnt = (entry for entry in entries("generators") if entry["row"].startswith("dense_similarity"))
    table = generators.run([text, learnt], EncoderSpec(), data, "test", masks=False)
    generator = generators.build(text, EncoderSpec()).generator_spec.build(
        EncoderSpec().build(), data.classes
    )
    row = prototypes.Row("text", generator.text_prototypes, generator.encoder.logit_scale)
    expected = prototypes.score(generator, [row], data.evaluation_dataset("test"), masks=False)
    assert table[text["row"]] == pytest.approx(expected["text"])
    assert table[learnt["row"]]["gap"] != table[text["row"]]["gap"]

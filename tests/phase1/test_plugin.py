"""The plug-in: the arithmetic of phase 1 behind four lines, whatever the host's conventions and order."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning import VPLPlugin
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig, solve
from vpl_lightning.functional.targets import TargetConfig, select_pixels
from vpl_lightning.store import MemorySamples, objective_from

RECIPE = PrototypeRecipe(solver=SolverConfig(steps=25))
EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_es_host.py"

Observation = tuple[Tensor, Tensor, list[int]]


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    return rows[:5], rows[5:]


@pytest.fixture(scope="module")
def observations(tiny_encoder: CLIPEncoder) -> list[Observation]:
    """Tokens, maps and labels of seven images of two sizes."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(7):
        h, w = (6, 8) if index % 2 else (7, 5)
        pixels = torch.randn(1, 3, 8 * h, 8 * w, generator=generator)
        encoded = tiny_encoder.encode(pixels)
        labels = torch.randperm(5, generator=generator)[: 1 + index % 3].tolist()
        found.append((encoded.tokens, torch.rand(len(labels), h, w, generator=generator), labels))
    return found


def learn(model, text, observations: list[Observation], **options) -> Tensor:
    plugin = VPLPlugin(model, *text, **{"recipe": RECIPE, **options})
    for tokens, cams, labels in observations:
        plugin.observe(tokens.transpose(0, 1), cams, labels)
    return torch.cat(plugin.fit())


@pytest.mark.parametrize("features", ["value", "final", "penultimate"])
def test_equals_phase_1_on_the_encoders_own_features(
    tiny_clip, tiny_encoder: CLIPEncoder, text, observations, features: str
) -> None:
    recipe = PrototypeRecipe(features=features, solver=RECIPE.solver)
    rows, columns = torch.cat(text), Columns(5, 3)
    parts = [
        select_pixels(
            cams,
            tiny_encoder.dense(tokens, features)[0],
            rows,
            torch.tensor(labels),
            num_foreground=5,
            config=recipe.targets,
        )
        for tokens, cams, labels in observations
    ]
    samples = MemorySamples.of(parts, rows=8, width=32)
    expected = columns.expand(solve(objective_from(samples, columns, rows, recipe), recipe.solver).rows, rows)
    found = learn(tiny_clip, text, observations, recipe=recipe)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float((found - rows).norm(dim=-1).min()) > 1e-3


def test_containers_and_types_do_not_matter(tiny_clip, text, observations) -> None:
    reference = learn(tiny_clip, text, observations)
    plugin = VPLPlugin(tiny_clip, *text, recipe=RECIPE)
    for index, (tokens, cams, labels) in enumerate(observations):
        if index % 3 == 0:
            plugin.observe(tokens, cams.numpy(), np.array(labels))
        elif index % 3 == 1:
            plugin.observe(tokens[0].numpy(), list(cams.numpy()), torch.tensor(labels))
        else:
            plugin.observe(tokens.clone().requires_grad_(), list(cams), tuple(labels))
    assert torch.equal(torch.cat(plugin.fit()), reference)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("max_pixels", [10_000, 60])
def test_order_does_not_matter(
    tiny_clip, text, observations, tmp_path: Path, where: str, max_pixels: int
) -> None:
    found = []
    for attempt in range(3):
        shuffled = list(observations)
        random.Random(attempt).shuffle(shuffled)
        folder = tmp_path / str(attempt) if where == "disk" else None
        found.append(learn(tiny_clip, text, shuffled, max_pixels=max_pixels, folder=folder))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    whole = learn(tiny_clip, text, observations)
    assert torch.equal(found[0], whole) == (max_pixels == 10_000)


def test_the_cap_is_kept_and_seeded(tiny_clip, text, observations) -> None:
    found = {}
    for seed in (0, 1):
        plugin = VPLPlugin(
            tiny_clip, *text, recipe=PrototypeRecipe(seed=seed, solver=RECIPE.solver), max_pixels=60
        )
        for tokens, cams, labels in observations:
            plugin.observe(tokens, cams, labels)
            assert len(plugin._pool) <= 76
        samples = [features for _, features, _ in plugin._pool.images()]
        assert sum(len(one.features) for one in samples) == 60
        found[seed] = torch.cat(plugin.fit())
    assert not torch.equal(found[0], found[1])


def test_half_precision_in_half_precision_out(tiny_clip, text, observations) -> None:
    reference = learn(tiny_clip, text, observations)
    half = tuple(part.half() for part in text)
    plugin = VPLPlugin(tiny_clip, *half, recipe=RECIPE)
    for tokens, cams, labels in observations:
        plugin.observe(tokens.half(), cams.half(), labels)
    fg, bg = plugin.fit()
    assert (fg.dtype, bg.dtype, fg.shape, bg.shape) == (torch.float16, torch.float16, (5, 32), (3, 32))
    torch.testing.assert_close(torch.cat([fg, bg]).float(), reference, atol=3e-2, rtol=0)
    torch.testing.assert_close(torch.cat([fg, bg]).float().norm(dim=-1), torch.ones(8), atol=1e-3, rtol=0)


def test_saves_and_loads(tiny_clip, text, observations, tmp_path: Path) -> None:
    whole = learn(tiny_clip, text, observations, max_pixels=60)
    for name, part in (("a", observations[:3]), ("b", observations[3:])):
        plugin = VPLPlugin(tiny_clip, *text, recipe=RECIPE, max_pixels=60)
        for tokens, cams, labels in part:
            plugin.observe(tokens, cams, labels)
        plugin.save(tmp_path / name)
    merged = VPLPlugin(tiny_clip, *text, recipe=RECIPE, max_pixels=60)
    merged.load(tmp_path / "b")
    merged.load(tmp_path / "a")
    assert merged.images == 7
    assert torch.equal(torch.cat(merged.fit()), whole)
    other = VPLPlugin(tiny_clip, *text, recipe=PrototypeRecipe(seed=3), max_pixels=60)
    with pytest.raises(ConfigurationError, match="recipe"):
        other.load(tmp_path / "a")
    for name, content in (("junk", b"junk"), ("absent", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            merged.load(tmp_path / name)
    empty = VPLPlugin(tiny_clip, *text, recipe=RECIPE)
    empty.save(tmp_path / "empty")
    empty.load(tmp_path / "empty")
    with pytest.raises(DataError, match="no pixel"):
        empty.fit()


def test_class_balance_counts_the_tags_seen(tiny_clip, text, observations) -> None:
    targets = TargetConfig(balance="class")
    balanced = learn(
        tiny_clip, text, observations, recipe=PrototypeRecipe(targets=targets, solver=RECIPE.solver)
    )
    again = learn(
        tiny_clip, text, observations[::-1], recipe=PrototypeRecipe(targets=targets, solver=RECIPE.solver)
    )
    assert torch.equal(balanced, again)
    assert not torch.allclose(balanced, learn(tiny_clip, text, observations), atol=1e-4)


def test_fits_under_inference_mode(tiny_clip, text, observations) -> None:
    with torch.inference_mode():
        found = learn(tiny_clip, text, observations)
    assert torch.equal(found, learn(tiny_clip, text, observations))


def test_wrong_use_is_answered(tiny_clip, text, observations) -> None:
    tokens, cams, labels = observations[0]
    plugin = VPLPlugin(tiny_clip, *text, recipe="paper")
    assert plugin.scale == 100
    wrong = [
        (tokens[..., :-1], cams, labels, "image_features"),
        (tokens.expand(2, -1, -1), cams, labels, "image_features"),
        (tokens, cams[..., :-1], labels, "patch"),
        (tokens, cams, [5], "labels"),
        (tokens, cams, [], "labels"),
        (tokens, cams, [1, 1], "labels"),
        (tokens, cams, [1, 2], "classes"),
        (tokens, cams * float("nan"), labels, "finite"),
    ]
    for one_tokens, one_cams, one_labels, match in wrong:
        with pytest.raises(DataError, match=match):
            plugin.observe(one_tokens, one_cams, one_labels)
    with pytest.raises(ConfigurationError, match="fg_text_features"):
        VPLPlugin(tiny_clip, text[0].T, text[1])
    with pytest.raises(ConfigurationError, match="Linear"):
        VPLPlugin(torch.nn.Linear(1, 1), *text)
    with pytest.raises(DataError, match="no pixel"):
        plugin.fit()
    with pytest.raises(ConfigurationError, match="max_pixels"):
        VPLPlugin(tiny_clip, *text, max_pixels=0)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_es_host", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_host_works_with_both_kinds_of_blocks() -> None:
    host = load_example()
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(7, 16, generator=generator), dim=-1)
    images = [(torch.randn(1, 3, 48, 40, generator=generator), [index, 4 - index]) for index in range(2)]
    found = []
    for returns_pair in (False, True):
        torch.manual_seed(0)
        model = host.Host(returns_pair)
        model.requires_grad_(False)
        found.append(torch.cat(host.run(model, images, rows[:5], rows[5:])))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0].norm(dim=-1), torch.ones(7))
    assert not torch.allclose(found[0], rows, atol=1e-2)


HEAVY = ("lightning", "jsonargparse", "open_clip", "wandb", "albumentations", "cv2", "scipy", "pycocotools")


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh process holds after running some code."""
    probe = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_plugin_loads_no_training_stack() -> None:
    assert loaded_after("from vpl_lightning import VPLPlugin; VPLPlugin.fit") == set()


def test_the_probe_can_fail() -> None:
    assert loaded_after("from vpl_lightning import VPLPlugin; import jsonargparse") == {"jsonargparse"}

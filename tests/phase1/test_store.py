"""The store of samples: any cut gives the same prototypes, nothing is ever half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.phase1.conftest import Clusters
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.prototypes import ObjectiveConfig
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig, solve
from vpl_lightning.functional.targets import Selected, TargetConfig
from vpl_lightning.store import FeatureStore, MemorySamples, balanced_statistics, objective_from
from vpl_lightning.store import samples as samples_module

COLUMNS = Columns(5, 2)


def fill(folder: Path, parts: list[Selected], size: int, **options) -> FeatureStore:
    store = FeatureStore(folder, {"seed": 0}, rows=7, width=24, **options)
    store.prepare()
    for block in range(-(-len(parts) // size)):
        images = parts[block * size : (block + 1) * size]
        store.write(block, [f"image{block * size + i}" for i in range(len(images))], images)
    return store


@pytest.fixture(scope="module")
def parts(clusters) -> list[Selected]:
    """Ten images, one of them without a sample, each with some classes of its own."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for part in clusters.parts():
        allowed = torch.rand(7, generator=generator) < 0.5
        allowed[5:] = True
        targets = (part.targets + 0.1).masked_fill(~allowed, 0)
        weights = 0.5 + torch.rand(len(part.features), generator=generator)
        found.append(
            part._replace(targets=targets / targets.sum(-1, keepdim=True), allowed=allowed, weights=weights)
        )
    found[3] = found[3]._replace(
        **{name: getattr(found[3], name)[:0] for name in ("features", "targets", "weights", "priorities")}
    )
    return found


def prototypes(source, clusters: Clusters, recipe: PrototypeRecipe):
    return solve(objective_from(source, COLUMNS, clusters.text, recipe), recipe.solver).rows


RECIPES = [
    PrototypeRecipe(solver=SolverConfig(steps=50)),
    PrototypeRecipe(solver=SolverConfig(steps=50, halving="raw"), objective=ObjectiveConfig(tau_image=0.03)),
    PrototypeRecipe(
        solver=SolverConfig(name="lbfgs", steps=20), objective=ObjectiveConfig(student_restrict="present")
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["objective", "raw", "lbfgs-present"])
def test_any_cut_gives_the_same_prototypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clusters, parts, recipe: PrototypeRecipe
) -> None:
    reference = prototypes(MemorySamples.of(parts, rows=7, width=24), clusters, recipe)
    for size, bytes_a_chunk in ((1, 2**20), (3, 2**20), (10, 24 * 4 * 200), (4, 1)):
        monkeypatch.setattr(samples_module, "CHUNK_BYTES", bytes_a_chunk)
        store = fill(tmp_path / f"{size}", parts, size)
        torch.testing.assert_close(prototypes(store, clusters, recipe), reference, atol=1e-9, rtol=0)
        copy = MemorySamples.copy(store, width=24, device=torch.device("cpu"))
        torch.testing.assert_close(prototypes(copy, clusters, recipe), reference, atol=1e-9, rtol=0)


def test_ranks_share_the_blocks(tmp_path: Path, clusters, parts) -> None:
    fill(tmp_path, parts, 3)
    whole = FeatureStore(tmp_path, {"seed": 0}, rows=7, width=24)
    ranks = [FeatureStore(tmp_path, {"seed": 0}, rows=7, width=24, rank=r, world_size=3) for r in range(3)]
    sums = [rank.statistics for rank in ranks]
    joint = sums[0] + sums[1] + sums[2]
    for name, value in whole.statistics.tensors().items():
        torch.testing.assert_close(joint.tensors()[name], value, rtol=1e-13, atol=1e-13)
    seen = [chunk.features for rank in ranks for chunk in rank.chunks()]
    assert sum(len(features) for features in seen) == sum(len(part.features) for part in parts)
    assert float(whole.statistics.images) == 9

    def all_reduce(tensor):
        return tensor * 1  # every rank alone, its share of the gradient is checked below

    recipe = RECIPES[0]
    shares = []
    for rank, local in zip(ranks, sums, strict=True):
        objective = objective_from(rank, COLUMNS, clusters.text, recipe, all_reduce=all_reduce, world_size=3)
        objective.statistics, objective._local = joint, local
        shares.append(objective.evaluate(clusters.text))
    expected = objective_from(whole, COLUMNS, clusters.text, recipe).evaluate(clusters.text)
    assert sum(share.value for share in shares) == pytest.approx(expected.value, rel=1e-12)
    torch.testing.assert_close(sum(share.gradient for share in shares), expected.gradient, atol=1e-12, rtol=0)


def test_an_interrupted_collection_goes_on(tmp_path: Path, parts) -> None:
    fill(tmp_path / "whole", parts, 2)
    store = fill(tmp_path / "broken", parts[:6], 2)
    assert store.finished() == {0, 1, 2}
    assert store.ids() == [f"image{index}" for index in range(6)]
    (tmp_path / "broken" / "00000003.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0half")
    truncated = tmp_path / "broken" / "00000001.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])

    again = FeatureStore(tmp_path / "broken", {"seed": 0}, rows=7, width=24)
    assert again.prepare() is None
    assert again.finished() == {0, 2}
    for block in (4, 1, 3):
        again.write(block, [f"image{2 * block}", f"image{2 * block + 1}"], parts[2 * block : 2 * block + 2])
    for block in range(5):
        name = f"{block:08d}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_other_settings_start_anew(tmp_path: Path, parts) -> None:
    fill(tmp_path, parts, 5)
    other = FeatureStore(tmp_path, {"seed": 1}, rows=7, width=24)
    assert other.finished() == set()
    assert "seed changed from 0 to 1" in str(other.prepare())
    assert not list(tmp_path.glob("*.safetensors"))


def write_all(folder: str) -> None:
    """Write what is missing of forty blocks."""
    store = FeatureStore(folder, {}, rows=3, width=64)
    store.prepare()
    done = store.finished()
    for block in set(range(40)) - done:
        generator = torch.Generator().manual_seed(block)
        features = torch.randn(4000, 64, generator=generator).half()
        targets = torch.rand(4000, 3, generator=generator).softmax(-1)
        allowed = torch.ones(3, dtype=torch.bool)
        image = Selected(features, targets, torch.ones(4000), allowed, torch.arange(4000))
        store.write(block, [str(block)], [image])


def test_killing_the_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = "import sys; from tests.phase1.test_store import write_all; write_all(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    while process.poll() is None and not list((tmp_path / "killed").glob("*.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = FeatureStore(tmp_path / "killed", {}, rows=3, width=64).finished()
    assert 0 < len(left) < 40
    for folder in ("killed", "whole"):
        write_all(str(tmp_path / folder))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_sinkhorn_equals_a_plain_transcription_of_inmap(tmp_path: Path, clusters, parts) -> None:
    targets = torch.cat([part.targets for part in parts]).half().double()
    weights = torch.cat([part.weights for part in parts]).double()
    features = torch.cat([part.features for part in parts]).double()
    plan = targets * weights[:, None]
    marginals = plan.sum(0) ** 0.5
    marginals = marginals / marginals.sum() * weights.sum()
    for _ in range(6):
        plan = plan * (marginals / plan.sum(0))
        plan = plan * (weights / plan.sum(1))[:, None]
    store = fill(tmp_path, parts, 3, keep_targets=True)
    for source in (store, MemorySamples.of(parts, rows=7, width=24, keep_targets=True)):
        found = balanced_statistics(source, 6, gamma=0.5)
        torch.testing.assert_close(found.mass, plan.sum(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.products, plan.T @ features, rtol=1e-2, atol=1e-2)
    recipe = PrototypeRecipe(targets=TargetConfig(sinkhorn_rounds=3), solver=SolverConfig(steps=5))
    balanced = prototypes(store, clusters, recipe)
    assert not torch.allclose(balanced, prototypes(store, clusters, RECIPES[0]), atol=1e-3)
    with pytest.raises(ConfigurationError, match="keep_targets"):
        prototypes(MemorySamples.of(parts, rows=7, width=24), clusters, recipe)
    with pytest.raises(ConfigurationError, match="keep_targets"):
        prototypes(fill(tmp_path / "bare", parts, 3), clusters, recipe)


def test_statistics_equal_numpy(parts) -> None:
    found = MemorySamples.of(parts, rows=7, width=24).statistics
    x = torch.cat([part.features for part in parts]).double().numpy()
    t = torch.cat([part.targets for part in parts]).double().numpy()
    w = torch.cat([part.weights for part in parts]).double().numpy()
    np.testing.assert_allclose(found.products, np.einsum("qr,q,qd->rd", t, w, x), atol=1e-4)
    entropy = -(w[:, None] * t * np.log(np.where(t > 0, t, 1))).sum()
    np.testing.assert_allclose(found.moments, np.einsum("q,qd,qe->de", w, x, x), atol=1e-4)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(found.region_counts, np.bincount(t.argmax(1), minlength=7))
    np.testing.assert_allclose(found.region_sums[2], x[t.argmax(1) == 2].sum(0), atol=1e-4)


def test_files_hold_no_code_and_say_what_they_are(tmp_path: Path, parts) -> None:
    fill(tmp_path, parts, 10)
    raw = (tmp_path / "00000000.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["features"] == {**header["features"], "dtype": "F16", "shape": [810, 24]}
    assert json.loads(header["__metadata__"]["samples"])["ids"][9] == "image9"


def test_wrong_samples_and_unreadable_files_are_refused(tmp_path: Path, parts) -> None:
    store = FeatureStore(tmp_path, {}, rows=6, width=24)
    store.prepare()
    with pytest.raises(ConfigurationError, match="7 prototypes"):
        store.write(0, ["a"], [parts[0]])
    (tmp_path / "00000004.safetensors").mkdir()
    with pytest.raises(DataError, match="00000004"):
        store.finished()


def test_features_are_released_block_by_block(tmp_path: Path) -> None:
    """A pass over the store holds one mapping at a time."""
    unit = F.normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)), dim=-1).half()
    image = Selected(
        unit, torch.ones(64, 7) / 7, torch.ones(64), torch.ones(7, dtype=torch.bool), torch.arange(64)
    )
    store = fill(tmp_path, [image] * 6, 1)
    for _ in store.chunks():
        mapped = Path("/proc/self/maps").read_text().count(str(tmp_path))
        assert mapped <= 2

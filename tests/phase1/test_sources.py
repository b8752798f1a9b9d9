"""Where prototypes come from: text, text moved by the modality gap, or learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.phase1.conftest import make_objective
from tests.trainers import trainer
from vpl_lightning import VPLPlugin
from vpl_lightning.artifacts import read_prototypes
from vpl_lightning.clip import CLIPEncoder
from vpl_lightning.data import ShapesDataModule
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig, solve
from vpl_lightning.functional.targets import TargetConfig
from vpl_lightning.specs import GeneratorSpec
from vpl_lightning.tasks import VisionPrototypeModule

ENSEMBLE = ("a photo of a {}.", "a drawing of a {}.")


def moved(text: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Liang et al.: every text embedding plus the difference of the means, normalised again."""
    shifted = text + (features.mean(0) - text.mean(0))
    return shifted / np.linalg.norm(shifted, axis=1, keepdims=True)


def fit(
    recipe: PrototypeRecipe, root: Path, templates: str | tuple[str, ...] = "single"
) -> VisionPrototypeModule:
    module = VisionPrototypeModule(recipe=recipe, generator=GeneratorSpec(templates=templates), batch_size=8)
    data = ShapesDataModule(train_images=8, val_images=1, test_images=1)
    trainer(root, max_epochs=1).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("background", ["learn_all", "text"])
def test_the_shift_is_the_difference_of_the_means(clusters, background: str) -> None:
    columns = Columns(4, 3, background)
    objective = make_objective(clusters.parts(), columns, clusters.text)
    recipe = PrototypeRecipe(source="modify_gap", targets=TargetConfig(background=background))
    found = solve(objective, recipe, start=recipe.start(objective))
    expected = moved(clusters.text.double().numpy(), clusters.features.double().numpy())
    if background == "text":
        expected[4:] = clusters.text[4:]
    np.testing.assert_allclose(found.rows.numpy(), expected, atol=1e-6)
    assert found.passes == 1
    assert found.objective == objective.evaluate(found.rows).value


def test_the_shift_brings_the_mean_of_text_to_that_of_the_features(clusters) -> None:
    objective = make_objective(clusters.parts(), Columns(4, 3), clusters.text)
    rows = PrototypeRecipe(source="modify_gap").start(objective)
    features = clusters.features.double()
    before = (clusters.text.double().mean(0) - features.mean(0)).norm()
    assert (rows.mean(0) - features.mean(0)).norm() < 0.5 * before


@pytest.mark.parametrize("source", ["modify_gap", "text"])
def test_the_plugin_gives_the_same(tiny_clip, source: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(5, 32, generator=generator), dim=-1)
    plugin = VPLPlugin(tiny_clip, text[:3], text[3:], recipe=PrototypeRecipe(source=source))
    for index in range(3):
        tokens, cams = (torch.randn(21, 1, 64, generator=generator), torch.rand(1, 4, 5, generator=generator))
        plugin.observe(tokens, cams, [index])
    features = np.concatenate([part.features.double().numpy() for _, part, _ in plugin._pool.images()])
    expected = moved(text.numpy(), features) if source == "modify_gap" else text.numpy()
    np.testing.assert_allclose(torch.cat(plugin.fit()).numpy(), expected, atol=1e-5)
    assert plugin.scale == 100


def stored_features(root: Path) -> Tensor:
    from safetensors.torch import load_file

    return torch.cat(
        [load_file(path)["features"].double() for path in (root / "features").glob("*.safetensors")]
    )


def test_one_setting_makes_a_run_of_another_source(tmp_path: Path) -> None:
    module = fit(PrototypeRecipe(source="modify_gap"), tmp_path)
    text = module.generator.text_prototypes.double().numpy()
    stored, metadata = read_prototypes(tmp_path / "prototypes.safetensors")
    np.testing.assert_allclose(stored.numpy(), moved(text, stored_features(tmp_path).numpy()), atol=1e-5)
    assert float(metadata["scale"]) == pytest.approx(module.text_scale)
    assert module.trainer.global_step == 1
    learnt = PrototypeRecipe(solver=SolverConfig(steps=2))
    again = fit(learnt, tmp_path / "learnt")
    assert again.vision_scale == pytest.approx(10)
    assert not torch.allclose(again.prototypes, module.prototypes)


def test_prompts_are_one_setting(tmp_path: Path) -> None:
    single = fit(PrototypeRecipe(source="text"), tmp_path / "single")
    ensemble = fit(PrototypeRecipe(source="text"), tmp_path / "ensemble", ENSEMBLE)
    names = (*single.classes.prompts, *single.classes.background)
    encoder = CLIPEncoder.embedded()
    texts = [encoder.encode_text([template.format(name) for name in names]) for template in ENSEMBLE]
    torch.testing.assert_close(single.prototypes, texts[0])
    torch.testing.assert_close(ensemble.prototypes, F.normalize(texts[0] + texts[1], dim=-1))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="source='shift': choose one of learnt, modify_gap, text"):
        PrototypeRecipe(source="shift")
    with pytest.raises(ConfigurationError, match="templates: 'many' is unknown"):
        GeneratorSpec(templates="many")

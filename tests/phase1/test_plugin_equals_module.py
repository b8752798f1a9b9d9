"""The plug-in in a host's loop learns what the Lightning module learns on the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainers import trainer
from vpl_lightning import VPLPlugin
from vpl_lightning.data import ShapesDataModule
from vpl_lightning.functional.recipe import PrototypeRecipe, SolverConfig
from vpl_lightning.specs import EncoderSpec
from vpl_lightning.tasks import VisionPrototypeModule

RECIPES = {
    "pgd": PrototypeRecipe(solver=SolverConfig(steps=60)),
    "paper": replace(PrototypeRecipe.preset("paper"), solver=SolverConfig(steps=60)),
    "lbfgs": PrototypeRecipe(solver=SolverConfig(name="lbfgs", steps=12)),
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_prototypes_are_equal(tmp_path: Path, recipe: PrototypeRecipe) -> None:
    data = ShapesDataModule(train_images=6)
    module = VisionPrototypeModule(encoder=EncoderSpec(), recipe=recipe, block_size=4)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)

    generator, images = module.generator, data.localisation_dataset("train")
    count = len(generator.classes.foreground)
    text = generator.text_prototypes
    plugin = VPLPlugin(module.encoder.model, text[:count], text[count:], recipe=recipe)
    with module.using("text"):
        for index in reversed(range(len(images))):
            sample = images[index]
            for _, encoded, (maps,) in generator.stream([sample["image"]], [sample["labels"]]):
                cams = maps.cams if recipe.seeds == "raw" else maps.affinity
                plugin.observe(encoded.tokens.transpose(0, 1), cams, sample["labels"])
    found = torch.cat(plugin.fit())
    torch.testing.assert_close(found, module.prototypes, atol=1e-5, rtol=0)
    assert float((found - text).norm(dim=-1).max()) > 0.1

"""From blocks of images to selected patches: one pass of the generator with text prototypes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.blocks import Block, BlockPlan
from vpl_lightning.cams import CAMGenerator
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.functional.targets import Selected, select_pixels
from vpl_lightning.progress import progress
from vpl_lightning.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class PatchSelector:
    """Selects the patches that phase 1 learns from.

    Attributes:
        generator: Makes the maps, with the prototypes and scale that it has.
        recipe: Features, seeds and targets.
        batch_size: At most so many images of equal grid at once.
        class_weights: For ``balance="class"``.
    """

    generator: CAMGenerator
    recipe: PrototypeRecipe
    batch_size: int
    class_weights: Float[Tensor, " R"] | None = None

    def select(self, block: Block) -> list[Selected]:
        """Select the patches of each image of a block."""
        encoder = self.generator.encoder
        images = [sample["image"] for sample in block.samples]
        labels = [sample["labels"] for sample in block.samples]
        selected: dict[int, Selected] = {}
        for members, encoded, maps in self.generator.stream(
            images, labels, resized=block.resized, batch_size=self.batch_size
        ):
            features = encoder.dense(encoded, self.recipe.features)
            for row, (index, found) in enumerate(zip(members, maps, strict=True)):
                cams = found.cams if self.recipe.seeds == "raw" else found.affinity
                selected[index] = select_pixels(
                    on_grid(cams, encoded.grid),
                    features[row],
                    self.generator.text_prototypes,
                    found.classes,
                    num_foreground=len(self.generator.classes.foreground),
                    config=self.recipe.targets,
                    key=block.samples[index]["id"],
                    seed=self.recipe.seed,
                    class_weights=self.class_weights,
                )
        return [selected[index] for index in range(len(images))]

    def collect(self, plan: BlockPlan, store: FeatureStore, *, num_workers: int = 0) -> None:
        """Write the blocks of this rank that the store does not hold yet."""
        blocks = plan.pending(store.finished())
        loaded = plan.load(blocks, patch_size=self.generator.encoder.patch_size, num_workers=num_workers)
        for block in progress(loaded, total=len(blocks), what="text maps and features", shown=plan.rank == 0):
            store.write(block.number, [sample["id"] for sample in block.samples], self.select(block))


def on_grid(maps: Float[Tensor, "K r s"], grid: tuple[int, int]) -> Float[Tensor, "K h w"]:
    """Resize maps to the patch grid, unless they are on it."""
    if tuple(maps.shape[1:]) == grid:
        return maps
    return F.interpolate(maps[None], grid, mode="bilinear", align_corners=False)[0]

"""Phase 1 as a LightningModule: collect patches, learn vision prototypes, score them, make pseudo-masks with them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from vpl_lightning.artifacts import Manifest, fingerprint, write_prototypes
from vpl_lightning.blocks import BlockPlan
from vpl_lightning.collect import PatchSelector
from vpl_lightning.data import SegmentationDataModule, TaggedImages
from vpl_lightning.data.checks import ranks
from vpl_lightning.functional.gap import gap_centroid
from vpl_lightning.functional.prototypes import PrototypeObjective
from vpl_lightning.functional.solvers import PrototypeSolver
from vpl_lightning.functional.targets import inverse_class_frequency
from vpl_lightning.store import FeatureStore, MemorySamples, SampleSource, objective_from
from vpl_lightning.tasks.checkpoints import LatestCheckpoint
from vpl_lightning.tasks.localiser import Localiser

CHECKPOINT_STEPS = 50
"""Solver steps between checkpoints."""
CACHE_BYTES = 1 << 30
"""Samples of phase 1 stay in memory between passes while they fit into this many bytes."""


class VisionPrototypeModule(Localiser):
    """Learns vision prototypes from images and tags; the prototypes then stand in for text in the same generator.

    ``fit`` passes once over the training images, stores features and targets of the selected patches, and takes
    ``recipe.solver.steps`` full-batch optimiser steps, or none with another ``recipe.source`` than ``learnt``.
    Arguments, and what the prototypes are used for: :class:`Localiser`.
    """

    stage: ClassVar[str] = "prototypes"
    objective: PrototypeObjective | None = None
    """Open from the start of ``fit``."""

    @staticmethod
    def prototype_file(root: str | Path) -> Path:
        """Where a run keeps its prototypes."""
        return Path(root) / "prototypes.safetensors"

    def settings(self, datamodule: SegmentationDataModule | None) -> dict[str, Any]:
        """Return all that the vision prototypes depend on."""
        data = {} if datamodule is None else self.map_settings(datamodule)
        return {**data, "text_scale": self.text_scale, "recipe": asdict(self.recipe)}

    def patch_settings(self, datamodule: SegmentationDataModule) -> dict[str, Any]:
        """Return all that the selected patches depend on."""
        recipe = asdict(self.recipe)
        kept = {key: recipe[key] for key in ("features", "seeds", "targets", "seed")}
        return {**self.map_settings(datamodule), "text_scale": self.text_scale, "recipe": kept}

    def stale_prototypes(self, root: Path, datamodule: SegmentationDataModule) -> str | None:
        """Return why the prototypes of a run folder cannot be reused, or None if they can."""
        if not self.prototype_file(root).is_file():
            return f"{self.prototype_file(root)} does not exist yet"
        return Manifest.match_or_explain(root / self.stage, self.settings(datamodule), complete=True)

    def training_loader(self, datamodule: SegmentationDataModule) -> DataLoader[int]:
        """One item an optimiser step: each is a pass over all selected patches."""
        return DataLoader(cast(Any, range(self.recipe.steps)), batch_size=None)

    def configure_optimizers(self) -> PrototypeSolver:
        """Return the solver."""
        return self.recipe.build([self.rows])

    def configure_callbacks(self) -> list[Callback]:
        """Keep the latest state beside the prototypes, so that an interrupted fit goes on."""
        path = Path(self.trainer.default_root_dir) / self.stage / "checkpoints" / "last.ckpt"
        return [LatestCheckpoint(path, steps=CHECKPOINT_STEPS)]

    def on_fit_start(self) -> None:
        """Collect what is missing of the store, and open the objective on it."""
        super().on_fit_start()
        self.fit_generator_once()
        datamodule = self.require_datamodule()
        root = Path(self.trainer.default_root_dir)
        rank, world_size = ranks()
        store = FeatureStore(
            root / "features",
            self.patch_settings(datamodule),
            rows=self.columns.rows,
            width=self.encoder.joint_width,
            rank=rank,
            world_size=world_size,
            keep_targets=self.recipe.targets.sinkhorn_rounds > 0,
        )
        if rank == 0:
            store.prepare()
            Manifest(self.settings(datamodule)).write(root / self.stage)
        self.trainer.strategy.barrier("store")
        images = datamodule.localisation_dataset("train")
        plan = BlockPlan(images, size=self.block_size, rank=rank, world_size=world_size)
        selector = PatchSelector(
            generator=self.generator,
            recipe=self.recipe,
            batch_size=self.batch_size,
            class_weights=self._class_weights(images),
        )
        with self.using("text"):
            selector.collect(plan, store, num_workers=self.num_workers)
        self.trainer.strategy.barrier("collected")
        self.objective = objective_from(
            self._samples(store),
            self.columns,
            self.generator.text_prototypes,
            self.recipe,
            all_reduce=self._all_reduce if world_size > 1 else None,
            world_size=world_size,
        )
        for solver in self.trainer.optimizers:
            cast(PrototypeSolver, solver).precondition(self.objective.statistics.curvature())
        if self.trainer.ckpt_path is None:
            with torch.no_grad():
                self.rows.copy_(self.recipe.start(self.objective))

    def _samples(self, store: FeatureStore) -> SampleSource:
        """Keep small stores in memory between passes; read large ones from disk."""
        width = self.encoder.joint_width
        bytes_needed = (2 * width + 4) * float(store.statistics.region_counts.sum())
        return (
            MemorySamples.copy(store, width=width, device=self.device)
            if bytes_needed < CACHE_BYTES
            else store
        )

    def _class_weights(self, images: TaggedImages) -> Tensor | None:
        if self.recipe.targets.balance != "class":
            return None
        counts = torch.zeros(len(self.classes.foreground), dtype=torch.int64)
        for row in range(len(images)):
            counts[images.labels(row)] += 1
        return inverse_class_frequency(counts, num_images=len(images), columns=self.columns)

    def _all_reduce(self, value: Tensor) -> Tensor:
        total = value.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(value.device)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Evaluate the objective over all selected patches: one pass."""
        objective = cast(PrototypeObjective, self.objective)
        value = objective(self.rows)
        seen = objective.statistics
        foreground = slice(0, len(self.classes.foreground))
        gap = gap_centroid(
            self.prototypes[foreground].cpu(), seen.region_sums[foreground], seen.region_counts[foreground]
        )
        self.log("objective", value.detach().float(), prog_bar=True)
        self.log("gap", gap, prog_bar=True)
        return value

    def on_fit_end(self) -> None:
        """Write the prototypes, also where the last step was in the checkpoint and no training was left."""
        root = Path(self.trainer.default_root_dir)
        datamodule = self.require_datamodule()
        if self.trainer.is_global_zero and self.trainer.global_step >= self.recipe.steps:
            metadata = {
                "classes": "\n".join(self.classes.foreground),
                "scale": repr(self.vision_scale),
                "fingerprint": fingerprint(self.settings(datamodule)),
            }
            write_prototypes(self.prototype_file(root), self.prototypes, metadata=metadata)
            Manifest(self.settings(datamodule), complete=True).write(root / self.stage)
        self.trainer.strategy.barrier("prototypes")

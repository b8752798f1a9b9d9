"""What vision prototypes are used for: localisation maps, their scores, and pseudo-masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpl_lightning.artifacts import Manifest, read_prototypes
from vpl_lightning.blocks import Block, BlockLoader, BlockPlan
from vpl_lightning.cams import CAMGenerator
from vpl_lightning.clip import ClassSet, class_set
from vpl_lightning.data import EvaluationBatch, SegmentationDataModule
from vpl_lightning.data.checks import ranks
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.recipe import PrototypeRecipe
from vpl_lightning.mask_stream import PseudoMaskStream
from vpl_lightning.masks import MaskConfig
from vpl_lightning.specs import EncoderSpec, GeneratorSpec
from vpl_lightning.structures import ImageArray
from vpl_lightning.tasks.base import SegmentationTask
from vpl_lightning.tasks.generator_bank import BANK, fit_generator
from vpl_lightning.tasks.localisation_scores import PrototypeComparison

VERSION = 1
"""Version of the code up to the maps, part of every fingerprint: raise it when they come out differently."""
Kind = Literal["text", "vision"]


class Localiser(SegmentationTask):
    """A CAM generator with text and with vision prototypes over the images of a data module.

    ``validate`` and ``test`` score the maps of text and of vision prototypes. ``predict`` writes pseudo-masks. Products
    go below ``trainer.default_root_dir``. How the vision prototypes come about is the subclass's.

    Args:
        encoder: Where the frozen CLIP comes from.
        generator: Which CAM generator, with its options.
        classes: Class set; None takes the data module's.
        recipe: All that decides what is learnt; or the name of a preset, ``default`` or ``paper``.
        text_scale: Factor of the cosines in the generator's softmax for text; None takes CLIP's own (100).
        masks: How refined maps become pseudo-masks.
        mask_workers: Processes that make masks; None: one a core.
        keep_maps: Also store patch-grid maps, a few kB an image.
        score_masks: Whether ``validate`` and ``test`` also score pseudo-masks (two dense CRFs an image).
        report: Whether the whole method ends with scores of text against vision prototypes on the validation split.
        block_size: Images a block: the unit of batching, writing and resuming.
        batch_size: At most so many images of equal grid go through the encoder at once.
        num_workers: Processes that decode images of phase 1.
    """

    def __init__(
        self,
        *,
        encoder: EncoderSpec = EncoderSpec(),
        generator: GeneratorSpec = GeneratorSpec(),
        classes: str | None = None,
        recipe: Literal["default", "paper"] | PrototypeRecipe = "default",
        text_scale: float | None = None,
        masks: MaskConfig = MaskConfig(),
        mask_workers: int | None = None,
        keep_maps: bool = False,
        score_masks: bool = False,
        report: bool = True,
        block_size: int = 32,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("block_size", block_size), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"model.{key}={value} must be at least 1")
        generator.check()
        self.hold(encoder=encoder.build())
        self.generator: CAMGenerator
        self.generator_spec = generator
        self.recipe = PrototypeRecipe.preset(recipe) if isinstance(recipe, str) else recipe
        self.text_scale = text_scale or self.encoder.logit_scale
        self.masks, self.mask_workers, self.keep_maps = masks, mask_workers, keep_maps
        self.score_masks, self.report = score_masks, report
        self.score_table: dict[str, dict[str, float]] = {}
        self.block_size, self.batch_size, self.num_workers = block_size, batch_size, num_workers
        self._stream: PseudoMaskStream | None = None
        self._fitted_with: dict[str, Any] | None = None
        if classes is not None:
            self.attach(class_set(classes))

    def attach(self, classes: ClassSet) -> None:
        """Build the generator for a class set; called with the data module's unless one was given.

        Raises:
            ConfigurationError: If another class set is attached already.
        """
        if hasattr(self, "generator"):
            if self.classes.foreground != classes.foreground:
                raise ConfigurationError(
                    f"model.classes is '{self.classes.name}' with {len(self.classes.foreground)} classes, the data "
                    f"has '{classes.name}' with {len(classes.foreground)}: leave model.classes out"
                )
            return
        self.hold(generator=self.generator_spec.build(self.encoder, classes))
        self.encoder.drop_text()
        self.classes = classes
        self.columns = Columns(
            len(classes.foreground), len(classes.background), self.recipe.targets.background
        )
        self.rows = nn.Parameter(self.columns.reduce(self.generator.text_prototypes).double())

    @property
    def prototypes(self) -> Float[Tensor, "C D"]:
        """The vision prototypes as they stand, unit rows, float32, foreground first."""
        return self.columns.expand(self.rows.detach(), self.generator.text_prototypes)

    @property
    def vision_scale(self) -> float:
        """Factor of the cosines that goes with the vision prototypes."""
        return self.recipe.scale(self.text_scale)

    @contextmanager
    def using(self, kind: Kind) -> Iterator[CAMGenerator]:
        """Give the generator one kind of prototypes, with the scale that goes with it."""
        text = kind == "text"
        self.generator.prototypes = self.generator.text_prototypes if text else self.prototypes
        self.generator.scale = self.text_scale if text else self.vision_scale
        yield self.generator

    # Files of a run, and what they depend on.

    @staticmethod
    def mask_folder(root: str | Path) -> Path:
        """Where a run keeps its pseudo-masks."""
        return Path(root) / "pseudo_masks"

    def map_settings(self, datamodule: SegmentationDataModule) -> dict[str, Any]:
        """Return all that maps with text prototypes depend on."""
        return {
            "version": VERSION,
            "encoder": self.encoder.fingerprint(),
            "classes": self.classes.to_dict(),
            "generator": asdict(self.generator_spec),
            "data": datamodule.fingerprint("train"),
            "blocks": [self.block_size, self.batch_size],
        }

    def mask_settings(self, datamodule: SegmentationDataModule) -> dict[str, Any]:
        """Return all that the maps made with the vision prototypes depend on."""
        rows = self.prototypes.cpu().contiguous().numpy().tobytes()
        found = {"prototypes": hashlib.sha256(rows).hexdigest(), "scale": self.vision_scale}
        bank = {"bank": {"text_scale": self.text_scale}} if self.generator.needs_fit else {}
        return {**self.map_settings(datamodule), **found, **bank}

    def load_prototypes(self, path: str | Path) -> None:
        """Take the vision prototypes of a file.

        Raises:
            DataError: If the file is unreadable or has another shape.
        """
        stored = read_prototypes(path).prototypes
        if stored.shape != self.generator.text_prototypes.shape:
            raise DataError(
                f"{path}: prototypes of shape {tuple(stored.shape)}, expected "
                f"{tuple(self.generator.text_prototypes.shape)} for '{self.classes.name}'"
            )
        with torch.no_grad():
            self.rows.copy_(self.columns.reduce(stored))

    def stale_masks(self, root: Path, datamodule: SegmentationDataModule) -> str | None:
        """Return why the masks of a run folder cannot be reused as they are, or None if they can."""
        settings = self.masks.settings(self.mask_settings(datamodule))
        return Manifest.match_or_explain(self.mask_folder(root), settings, complete=True)

    def fit_generator_once(self) -> None:
        """Let a generator that learns from the training images do so, with text prototypes; once."""
        datamodule = self.require_datamodule()
        settings = {**self.map_settings(datamodule), "text_scale": self.text_scale}
        if not self.generator.needs_fit or self._fitted_with == settings:
            return
        rank, world_size = ranks()
        images = datamodule.localisation_dataset("train")
        with self.using("text") as generator:
            fit_generator(
                generator,
                BlockPlan(images, size=self.block_size, rank=rank, world_size=world_size),
                Path(self.trainer.default_root_dir) / BANK,
                settings,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )
        self._fitted_with = settings

    def setup(self, stage: str) -> None:
        """Build the generator for the data's classes, and the scores of the stage."""
        self.attach(self.require_datamodule().classes)
        if stage in ("fit", "validate", "test"):
            masks = replace(self.masks, confidence=0.0) if self.score_masks else None
            self.comparison = PrototypeComparison(
                len(self.classes.foreground), self.encoder.joint_width, masks=masks
            )

    # Scores of maps.

    def on_validation_start(self) -> None:
        """Have the generator ready."""
        self.fit_generator_once()

    on_test_start = on_validation_start

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Score the maps of text and vision prototypes on tagged images with truth."""
        for image, mask, labels in zip(batch["image"], batch["mask"], batch["labels"], strict=True):
            ids = labels.nonzero().flatten().tolist()
            if mask is not None and ids:
                self._compare(image.permute(1, 2, 0).cpu().numpy(), mask, ids)

    test_step = validation_step

    def _compare(self, image: ImageArray, mask: Tensor, ids: list[int]) -> None:
        with self.using("text") as generator:
            ((_, encoded, (maps,)),) = generator.stream([image], [ids])
            self.comparison.text.update(image, maps, mask)
        with self.using("vision") as generator:
            (maps,) = generator.localise([image], encoded, [generator.check_labels(ids)])
            self.comparison.vision.update(image, maps, mask)
        features = self.encoder.dense(encoded, self.recipe.features)[0]
        self.comparison.regions.update(features, mask, encoded.grid)

    def on_validation_epoch_end(self) -> None:
        """Log the scores: ``val_miou`` is that of the refined maps of vision prototypes."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split."""
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        self.score_table = self.comparison.table(self.generator.text_prototypes, self.prototypes)
        self.log(f"{split}_miou", self.score_table["vision"]["refined"], prog_bar=True, sync_dist=True)
        for kind, row in self.score_table.items():
            self.log_dict({f"{split}_{kind}_{key}": value for key, value in row.items()}, sync_dist=True)

    # Pseudo-masks.

    def prediction_loader(self, datamodule: SegmentationDataModule) -> BlockLoader:
        """Return this rank's blocks of training images that have no mask yet."""
        return BlockLoader(
            datamodule.localisation_dataset("train"),
            size=self.block_size,
            patch_size=self.encoder.patch_size,
            done=lambda: self._masks(datamodule).done_ids(),
            num_workers=self.num_workers,
        )

    def _masks(self, datamodule: SegmentationDataModule) -> PseudoMaskStream:
        if self._stream is None:
            root = Path(self.trainer.default_root_dir)
            self._stream = PseudoMaskStream(
                self.mask_folder(root),
                self.masks,
                settings=self.mask_settings(datamodule),
                workers=self.mask_workers,
                maps_folder=root / "maps" if self.keep_maps else None,
            )
        return self._stream

    def on_predict_start(self) -> None:
        """Have the generator ready, and open the stream of masks."""
        self.fit_generator_once()
        self._done = self._masks(self.require_datamodule()).done_ids()

    def predict_step(self, batch: Block, batch_idx: int) -> list[str]:
        """Make a block's maps with the vision prototypes, hand them to the stream, and return its ids."""
        stream = cast(PseudoMaskStream, self._stream)
        images = [sample["image"] for sample in batch.samples]
        labels = [sample["labels"] for sample in batch.samples]
        with self.using("vision") as generator:
            for members, _, maps in generator.stream(
                images, labels, resized=batch.resized, batch_size=self.batch_size
            ):
                for index, found in zip(members, maps, strict=True):
                    if batch.samples[index]["id"] not in self._done:
                        stream.submit(batch.samples[index]["id"], images[index], found)
        return [sample["id"] for sample in batch.samples]

    def on_predict_end(self) -> None:
        """Wait for the last masks and record that none is missing."""
        cast(PseudoMaskStream, self._stream).close()
        self._stream = None
        self.trainer.strategy.barrier("masks done")
        if self.trainer.is_global_zero:
            settings = self.masks.settings(self.mask_settings(self.require_datamodule()))
            Manifest(settings, complete=True).write(self.mask_folder(self.trainer.default_root_dir))
        self.trainer.strategy.barrier("masks recorded")

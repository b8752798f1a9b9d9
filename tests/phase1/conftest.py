"""Seeded data that stands in for the dense features and the maps of a CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.prototypes import ObjectiveConfig, PrototypeObjective
from vpl_lightning.functional.statistics import Statistics
from vpl_lightning.functional.sweep import PixelChunk
from vpl_lightning.functional.targets import Selected


@dataclass(frozen=True)
class Clusters:
    """Unit features around class centres, text on the other side of a gap, noisy targets."""

    features: Tensor
    text: Tensor
    targets: Tensor

    def parts(self, **changes: Tensor) -> list[Selected]:
        """Cut the samples into images of 90, with some values replaced."""
        count, rows = self.targets.shape
        values = {
            "features": self.features,
            "targets": self.targets,
            "weights": torch.ones(count),
            "priorities": torch.arange(count),
        }
        values = {**values, **changes}
        length = len(values["features"])
        cut = {name: value[:length].split(90) for name, value in values.items()}
        allowed = torch.ones(rows, dtype=torch.bool)
        return [
            Selected(allowed=allowed, **{name: value[index] for name, value in cut.items()})
            for index in range(len(cut["features"]))
        ]


@pytest.fixture(scope="session")
def clusters() -> Clusters:
    """900 samples of 7 classes in 24 dimensions, a fifth of them with a wrong one-hot target."""
    generator = torch.Generator().manual_seed(3)
    rows, width, count = 7, 24, 900
    cone = torch.randn(width, generator=generator)
    centres = F.normalize(torch.randn(rows, width, generator=generator) + cone / 2, dim=-1)
    classes = torch.randint(0, rows, (count,), generator=generator)
    noise = torch.randn(count, width, generator=generator) * 0.2
    features = F.normalize(centres[classes] + noise, dim=-1).half()
    text = F.normalize(centres / 3 + 0.2 * torch.randn(rows, width, generator=generator), dim=-1)
    wrong = torch.rand(count, generator=generator) < 0.2
    told = torch.where(wrong, torch.randint(0, rows, (count,), generator=generator), classes)
    return Clusters(features, text, F.one_hot(told, rows).float())


def make_objective(
    parts: list[Selected], columns: Columns, text: Tensor, *, chunk_images: int = 4, **config: object
) -> PrototypeObjective:
    """Return the objective over the samples of some images, cut into chunks."""

    def chunks() -> Iterator[PixelChunk]:
        for start in range(0, len(parts), chunk_images):
            some = parts[start : start + chunk_images]
            yield PixelChunk(
                torch.cat([part.features for part in some]),
                torch.cat([part.weights for part in some]),
                torch.repeat_interleave(torch.tensor([len(part.features) for part in some])),
                torch.stack([part.allowed for part in some]),
            )

    statistics = sum((Statistics.of(part) for part in parts), Statistics.zeros(columns.rows, text.shape[1]))
    return PrototypeObjective(chunks, statistics, columns, columns.reduce(text), ObjectiveConfig(**config))

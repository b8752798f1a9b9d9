"""The support bank: instance prototypes of many images, a bounded number a class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpl_lightning.functional.sampling import pixel_priorities

SLACK = 2
"""Times its capacity that a class may hold before the surplus is dropped."""


class SupportBank:
    """Keeps, of each class, a random choice of instance prototypes that depends on image ids alone.

    Every prototype has a priority drawn from the seed, its image id and its class; the smallest stay. So
    neither the order of images nor the number of processes changes the bank, and an image counts once.

    Args:
        num_classes: N.
        width: D.
        capacity: Prototypes a class.
        seed: Of the choice.
    """

    def __init__(self, *, num_classes: int, width: int, capacity: int, seed: int) -> None:
        self.num_classes, self.width, self.capacity, self.seed = num_classes, width, capacity, seed
        self._rows: list[dict[int, Tensor]] = [{} for _ in range(num_classes)]

    def add(self, key: str, classes: Int[Tensor, " K"], prototypes: Float[Tensor, "K D"]) -> None:
        """Add the prototypes of one image."""
        priorities = pixel_priorities(key, self.num_classes, seed=self.seed).tolist()
        for label, row in zip(classes.tolist(), prototypes.cpu(), strict=True):
            self._put(label, priorities[label], row.clone())

    def rows(self, label: int) -> Float[Tensor, "Q D"]:
        """Return the prototypes of a class, smallest priority first."""
        kept = self._kept(label)
        return torch.stack([row for _, row in kept]) if kept else torch.zeros(0, self.width)

    def state(self) -> dict[str, Tensor]:
        """Return the bank as tensors: class, priority and prototype of each entry."""
        entries = [(label, *entry) for label in range(self.num_classes) for entry in self._kept(label)]
        return {
            "classes": torch.tensor([label for label, _, _ in entries], dtype=torch.int64),
            "priorities": torch.tensor([priority for _, priority, _ in entries], dtype=torch.int64),
            "prototypes": torch.cat(
                [torch.zeros(0, self.width), *(row[None].float() for _, _, row in entries)]
            ),
        }

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the entries of another bank; those that are here already change nothing."""
        columns = (state["classes"].tolist(), state["priorities"].tolist(), state["prototypes"])
        for label, priority, row in zip(*columns, strict=True):
            self._put(label, priority, row.clone())

    def _put(self, label: int, priority: int, row: Tensor) -> None:
        self._rows[label].setdefault(priority, row)
        if len(self._rows[label]) >= SLACK * self.capacity:
            self._rows[label] = dict(self._kept(label))

    def _kept(self, label: int) -> list[tuple[int, Tensor]]:
        return sorted(self._rows[label].items(), key=lambda entry: entry[0])[: self.capacity]

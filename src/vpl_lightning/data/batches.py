"""Batches as the Lightning tasks receive them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vpl_lightning.data.images import Sample, TaggedImages
from vpl_lightning.data.transforms import RandomView
from vpl_lightning.errors import DataError


class TrainingBatch(TypedDict):
    """Random views of equal size."""

    id: list[str]
    image: UInt8[Tensor, "B 3 S S"]
    mask: Int64[Tensor, "B S S"]
    """0 background, class id + 1 foreground, 255 ignored."""
    labels: Bool[Tensor, "B N"]
    """Tags of the whole images; a view may show fewer."""


class EvaluationBatch(TypedDict):
    """Whole images, each of its own size."""

    id: list[str]
    image: list[UInt8[Tensor, "3 H W"]]
    mask: list[Int64[Tensor, "H W"] | None]
    """The truth, or None where there is none."""
    labels: Bool[Tensor, "B N"]


class TrainingViews(Dataset[Sample]):
    """Random views of images with masks, a function of (seed, epoch, row) alone.

    Args:
        images: Images with masks.
        view: Makes the views.
        seed: Changes all of them.
    """

    def __init__(self, images: TaggedImages, view: RandomView, *, seed: int) -> None:
        self.images = images
        self.view = view
        self.seed = seed

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitem__(self, key: int) -> Sample:
        """Return the view of row ``key % len(self)`` in epoch ``key // len(self)``."""
        epoch, row = divmod(key, len(self))
        sample = self.images[row]
        if sample["mask"] is None:
            raise DataError(f"image '{sample['id']}' has no mask to train on")
        image, mask = self.view(sample["image"], sample["mask"], key=(self.seed, epoch, row))
        return Sample(id=sample["id"], image=image, labels=sample["labels"], mask=mask)


class TrainingCollator:
    """Stacks random views.

    Args:
        num_labels: Foreground classes, N.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def __call__(self, samples: Sequence[Sample]) -> TrainingBatch:
        """Stack samples whose images have one size."""
        return TrainingBatch(
            id=[sample["id"] for sample in samples],
            image=torch.stack([_image_tensor(sample) for sample in samples]),
            mask=torch.stack([torch.from_numpy(sample["mask"]).long() for sample in samples]),
            labels=_label_matrix(samples, self.num_labels),
        )


class EvaluationCollator:
    """Lists whole images.

    Args:
        num_labels: Foreground classes, N.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def __call__(self, samples: Sequence[Sample]) -> EvaluationBatch:
        """List samples."""
        masks = [sample["mask"] for sample in samples]
        return EvaluationBatch(
            id=[sample["id"] for sample in samples],
            image=[_image_tensor(sample) for sample in samples],
            mask=[None if mask is None else torch.from_numpy(mask).long() for mask in masks],
            labels=_label_matrix(samples, self.num_labels),
        )


class EvaluationLoader:
    """Whole images as Lightning's loops want a loader: an iterable with a length of at least one.

    A process that has no image gets one batch without any: Lightning stops at a loader without batches, or
    leaves out the hooks in which the other processes wait for this one.

    Args:
        loader: This process's images.
        empty: What :class:`EvaluationCollator` makes of no sample.
    """

    def __init__(self, loader: DataLoader[EvaluationBatch], empty: EvaluationBatch) -> None:
        self.loader = loader
        self.empty = empty

    def __len__(self) -> int:
        """Count the batches."""
        return max(1, len(self.loader))

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Iterate over the batches."""
        return iter(self.loader) if len(self.loader) else iter([self.empty])


def _image_tensor(sample: Sample) -> UInt8[Tensor, "3 H W"]:
    return torch.from_numpy(sample["image"]).permute(2, 0, 1).contiguous()


def _label_matrix(samples: Sequence[Sample], num_labels: int) -> Bool[Tensor, "B N"]:
    labels = torch.zeros(len(samples), num_labels, dtype=torch.bool)
    for row, sample in enumerate(samples):
        labels[row, sample["labels"]] = True
    return labels

"""The score of a data set, accumulated batch by batch and over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from torchmetrics import Metric

from vpl_lightning.functional.confusion import IGNORE, confusion_matrix, iou, mean_iou


class SegmentationConfusion(Metric):
    """One integer confusion matrix over a data set; ranks are summed, so no split of it changes a bit.

    ``torchmetrics.segmentation.MeanIoU`` averages over images and refuses 255; neither is VOC's mIoU.

    Args:
        num_classes: Classes, background included.
        ignore: Label of pixels that are left out.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    matrix: Int64[Tensor, "C C"]

    def __init__(self, num_classes: int, *, ignore: int = IGNORE) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore = ignore
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", zeros, dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """True: a rank that got no image of a small data set has nothing to warn of."""
        return True

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one image or batch.

        Args:
            prediction: Labels of any shape.
            target: The truth, of the same shape.

        Raises:
            DataError: If a label is no class.
        """
        self.matrix += confusion_matrix(prediction, target, self.num_classes, ignore=self.ignore)

    def compute(self) -> Int64[Tensor, "C C"]:
        """Return the matrix of all ranks; rows are the truth."""
        return self.matrix

    def miou(self) -> float:
        """Return the mean IoU over the classes that the truth of all ranks shows."""
        return mean_iou(self.compute())


def score_table(matrix: Int64[Tensor, "C C"], names: Sequence[str]) -> str:
    """Lay out the IoU of each class and the mean, in percent, as text.

    Args:
        matrix: Rows are the truth.
        names: Of all classes, background first.
    """
    width = max(map(len, [*names, "mean"]))
    scores = iou(matrix).tolist()
    rows = [
        f"{name:<{width}} {'absent' if score != score else f'{100 * score:.2f}':>7}"
        for name, score in zip(names, scores, strict=True)
    ]
    return "\n".join([*rows, f"{'mean':<{width}} {100 * mean_iou(matrix):7.2f}"])

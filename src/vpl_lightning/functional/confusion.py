"""Scores of label maps: one integer confusion matrix for a whole data set, and the IoU that follows."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vpl_lightning.errors import DataError

IGNORE = 255
"""Label of pixels that are not scored, VOC's void."""

Absent = Literal["nan", "zero"]
"""What the IoU of a class is that has no pixel in the truth: no number at all, or zero."""


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, *, ignore: int = IGNORE
) -> Int64[Tensor, "num_classes num_classes"]:
    """Count pixels by true and predicted class, without rounding and in the same order whatever the device.

    Only the truth can exclude a pixel, as in the VOC devkit. CLIP-ES's `eval_cam.py` also drops true labels
    beyond the last class in silence; here they are an error.

    Args:
        prediction: Integer labels ``0..num_classes - 1`` of any shape.
        target: The truth, of the same shape; the same labels, or ``ignore``.
        num_classes: Classes, background included.
        ignore: Label of pixels that are left out.

    Returns:
        Rows are the truth, columns the prediction.

    Raises:
        DataError: If the shapes differ, or a label is no class where it counts.
    """
    if prediction.shape != target.shape:
        raise DataError(
            f"a prediction of shape {tuple(prediction.shape)} for a truth of {tuple(target.shape)}"
        )
    counted = target != ignore
    truth, guess = target[counted].long(), prediction[counted].long()
    for name, labels in (("truth", truth), ("prediction", guess)):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            unknown = sorted(set(labels[(labels < 0) | (labels >= num_classes)].tolist()))
            raise DataError(
                f"labels {unknown[:5]} of the {name} are not in 0..{num_classes - 1}; check the class set"
            )
    counts = torch.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def iou(matrix: Int64[Tensor, "C C"], *, absent: Absent = "nan") -> Float64[Tensor, " C"]:
    """Return intersection over union of each class.

    Args:
        matrix: Rows are the truth.
        absent: ``nan``: a class without a true pixel has no IoU, even if it was predicted, and
            :func:`mean_iou` leaves it out (CLIP-ES's rule); ``zero``: it has the IoU 0. Equal where the truth
            shows every class, as on the whole VOC and COCO validation sets.
    """
    counts = matrix.cpu().double()
    truth = counts.sum(1)
    union = truth + counts.sum(0) - counts.diagonal()
    ratio = counts.diagonal() / union.clamp(min=1)
    return ratio.masked_fill(truth == 0, float("nan")) if absent == "nan" else ratio


def mean_iou(matrix: Int64[Tensor, "C C"], *, absent: Absent = "nan") -> float:
    """Return the mean of :func:`iou` over the classes that have one, background included; NaN if none has."""
    return float(iou(matrix, absent=absent).nanmean())


def pixel_accuracy(matrix: Int64[Tensor, "C C"]) -> float:
    """Return the share of scored pixels that have their true label; NaN if none was scored."""
    return float(matrix.diagonal().sum().double() / matrix.sum().double())

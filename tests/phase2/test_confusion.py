"""The confusion matrix and its IoU against scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from vpl_lightning.errors import DataError
from vpl_lightning.functional.confusion import confusion_matrix, iou, mean_iou, pixel_accuracy
from vpl_lightning.metrics import SegmentationConfusion, score_table


def random_maps(seed: int, num_classes: int, *, void: float = 0.2, shape: tuple[int, ...] = (2, 37, 23)):
    generator = np.random.default_rng(seed)
    target = generator.integers(0, num_classes, shape)
    wrong = generator.integers(0, num_classes, shape)
    prediction = np.where(generator.random(shape) < 0.5, target, wrong)
    target[generator.random(shape) < void] = 255
    return torch.from_numpy(prediction), torch.from_numpy(target)


@pytest.mark.parametrize("num_classes", [21, 81])
@given(seed=st.integers(0, 2**32 - 1), void=st.sampled_from([0.0, 0.3, 0.98, 1.0]))
def test_matrix_equals_scikit_learn(num_classes: int, seed: int, void: float):
    prediction, target = random_maps(seed, num_classes, void=void)
    counted = target != 255
    if counted.any():
        expected = sklearn.metrics.confusion_matrix(
            target[counted].numpy(), prediction[counted].numpy(), labels=np.arange(num_classes)
        )
    else:
        expected = np.zeros((num_classes, num_classes), np.int64)
    found = confusion_matrix(prediction, target, num_classes)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_matrix_takes_eight_bit_labels(dtype: torch.dtype):
    prediction, target = random_maps(0, 81)
    assert confusion_matrix(prediction.to(dtype), target.to(dtype), 81).equal(
        confusion_matrix(prediction, target, 81)
    )


def test_iou_equals_the_jaccard_score_and_torchmetrics():
    prediction, target = random_maps(3, 21)
    counted = target != 255
    matrix = confusion_matrix(prediction, target, 21)
    expected = sklearn.metrics.jaccard_score(
        target[counted].numpy(), prediction[counted].numpy(), average=None
    )
    np.testing.assert_allclose(iou(matrix).numpy(), expected, rtol=1e-14)
    other = MulticlassJaccardIndex(21, average="macro", ignore_index=255)
    assert mean_iou(matrix) == pytest.approx(float(other(prediction, target)), abs=1e-6)
    assert pixel_accuracy(matrix) == pytest.approx((prediction == target)[counted].double().mean().item())


def test_absent_classes():
    # Truth has 0 and 2; class 1 is predicted though absent, class 3 occurs nowhere.
    target = torch.tensor([0, 0, 2, 2, 255])
    prediction = torch.tensor([0, 1, 2, 2, 3])
    matrix = confusion_matrix(prediction, target, 4)
    torch.testing.assert_close(
        iou(matrix), torch.tensor([0.5, math.nan, 1.0, math.nan], dtype=torch.float64), equal_nan=True
    )
    assert mean_iou(matrix) == 0.75
    assert iou(matrix, absent="zero").tolist() == [0.5, 0.0, 1.0, 0.0]
    assert mean_iou(matrix, absent="zero") == 0.375
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


def test_rows_are_the_truth():
    assert confusion_matrix(torch.tensor([1]), torch.tensor([0]), 2).tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([3], [0], r"labels \[3\] of the prediction"),
        ([0], [9], r"labels \[9\] of the truth"),
        ([255], [0], r"labels \[255\] of the prediction"),
        ([0], [-1], "of the truth"),
        ([0, 0], [0], "shape"),
    ],
)
def test_unknown_labels_are_refused(prediction: list[int], target: list[int], message: str):
    with pytest.raises(DataError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(target), 3)


def test_unknown_predictions_do_not_matter_under_void():
    assert confusion_matrix(torch.tensor([255]), torch.tensor([255]), 3).sum() == 0


def test_metric_accumulates_and_resets():
    metric = SegmentationConfusion(21)
    assert metric.compute().sum() == 0
    parts = [random_maps(seed, 21) for seed in range(3)]
    for prediction, target in parts:
        metric.update(prediction, target)
    whole = confusion_matrix(torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts]), 21)
    assert metric.compute().equal(whole)
    assert metric.miou() == mean_iou(whole)
    metric.reset()
    assert metric.compute().sum() == 0


def test_table_names_every_class():
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert score_table(matrix, ["background", "cat", "dog"]).splitlines() == [
        "background   75.00",
        "cat          80.00",
        "dog         absent",
        "mean         77.50",
    ]

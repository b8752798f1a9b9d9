"""Cross-entropy over pixels against torch's own, and where torch's own is not a number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.functional.pixel_loss import pixel_cross_entropy, shown_classes


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 4, (2, 12, 20), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = 255
    return logits, mask


def test_plain_loss_is_torchs(batch: tuple[Tensor, Tensor]):
    logits, mask = batch
    large = F.interpolate(logits, (12, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        pixel_cross_entropy(logits, mask), F.cross_entropy(large, mask, ignore_index=255)
    )


def test_balanced_loss_is_half_background_half_foreground(batch: tuple[Tensor, Tensor]):
    logits, mask = batch
    large = F.interpolate(logits, (12, 20), mode="bilinear", align_corners=False)
    background = F.cross_entropy(large, mask.masked_fill(mask != 0, 255), ignore_index=255)
    foreground = F.cross_entropy(large, mask.masked_fill(mask == 0, 255), ignore_index=255)
    found = pixel_cross_entropy(logits, mask, balanced=True)
    torch.testing.assert_close(found, (background + foreground) / 2)
    assert abs(found - pixel_cross_entropy(logits, mask)) > 1e-4


@pytest.mark.parametrize("label", [0, 2])
def test_balanced_loss_where_one_side_is_missing(batch: tuple[Tensor, Tensor], label: int):
    logits, mask = batch[0], torch.full((2, 12, 20), label)
    torch.testing.assert_close(
        pixel_cross_entropy(logits, mask, balanced=True), pixel_cross_entropy(logits, mask)
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_nothing_labelled_costs_nothing(batch: tuple[Tensor, Tensor], balanced: bool):
    logits = batch[0].requires_grad_()
    loss = pixel_cross_entropy(logits, torch.full((2, 12, 20), 255), balanced=balanced)
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().sum() == 0


def test_shown_classes(batch: tuple[Tensor, Tensor]):
    mask = torch.tensor([[[0, 3], [255, 3]], [[1, 2], [2, 255]], [[0, 255], [255, 0]]])
    assert shown_classes(mask, 3).tolist() == [
        [False, False, True],
        [True, True, False],
        [False, False, False],
    ]

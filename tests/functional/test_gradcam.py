"""Class weights and maps of Grad-CAM against torch's own modules under autograd."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import QuickGELU
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vpl_lightning.functional import gradcam
from vpl_lightning.functional.vit import BlockTrace, HeadWeights, block_weights, norm_weights, trace_block

ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """The modules of a CLIP block, and the head that follows it, every parameter random."""

    def __init__(self, *, width: int, heads: int, hidden: int, joint: int, activation: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))
        post = nn.LayerNorm(width)
        for parameter in (*self.parameters(), *post.parameters()):
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * parameter.shape[-1] ** -0.5
        self.post = [post]
        self.projection = torch.randn(width, joint, dtype=torch.float64)

    def head(self) -> HeadWeights:
        return HeadWeights(norm_weights(self.post[0]), self.projection)


class Case:
    """Random images at one block, their classes, and the arguments that the functions take."""

    def __init__(
        self, *, patches: int, counts: list[int], words: int, scale: float, seed: int, **sizes
    ) -> None:
        torch.manual_seed(seed)
        self.block = Block(**sizes)
        self.num_labels = max(counts) + 2
        self.scale = scale
        self.inputs = torch.randn(len(counts), 1 + patches, sizes["width"], dtype=torch.float64)
        rows = torch.randn(self.num_labels + words, sizes["joint"], dtype=torch.float64)
        self.prototypes = F.normalize(rows, dim=-1)
        self.present = [torch.randperm(self.num_labels)[:count] for count in counts]

    def find(self, function=gradcam.gradcam_weights, dtype=torch.float64, **options) -> list[torch.Tensor]:
        with torch.no_grad():
            block = self.block.to(dtype)
            self.block.post[0].to(dtype)
            weights, head = block_weights(block), self.block.head()
            head = HeadWeights(head.norm, head.projection.to(dtype))
            trace = trace_block(self.inputs.to(dtype), weights)
            return function(
                trace,
                weights,
                head,
                self.prototypes.to(dtype),
                self.present,
                num_labels=self.num_labels,
                scale=self.scale,
                **options,
            )

    def expect(self, *, probability: bool = False) -> list[torch.Tensor]:
        """One image and one class at a time, through torch's modules."""
        block, found = self.block, []
        for tokens, labels in zip(self.inputs, self.present, strict=True):
            normed = block.ln_1(tokens[None]).detach().requires_grad_()
            middle = tokens + block.attn(normed, normed, normed, need_weights=False)[0]
            outputs = middle + block.mlp(block.ln_2(middle))
            feature = F.normalize(block.post[0](outputs)[0, 1:].mean(0) @ block.projection, dim=0)
            rivals = torch.cat([self.prototypes[labels], self.prototypes[self.num_labels :]])
            logits = self.scale * rivals @ feature
            scores = logits.softmax(0) if probability else logits.log_softmax(0)
            rows = [
                torch.autograd.grad(scores[k], normed, retain_graph=True)[0][0, 1:].mean(0)
                for k in range(len(labels))
            ]
            found.append(torch.stack(rows))
        return found


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest entry, over images."""
    return max(
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


SMALL = {"patches": 12, "words": 5, "scale": 10.0, "width": 24, "heads": 3, "hidden": 40, "joint": 16}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_and_reference_path_equal_autograd(activation: str) -> None:
    case = Case(**SMALL, counts=[1, 3, 1, 4, 2], activation=activation, seed=1)
    for score in ("log_probability", "probability"):
        expected = case.expect(probability=score == "probability")
        assert error(case.find(score=score), expected) < 1e-12
        assert error(case.find(gradcam.gradcam_weights_autograd, score=score), expected) < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    patches=st.integers(1, 20),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    words=st.integers(1, 6),
    heads=st.integers(1, 3),
    head_width=st.integers(4, 9),
    hidden=st.integers(1, 40),
    joint=st.integers(2, 12),
    scale=st.floats(0.5, 8),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)
def test_closed_form_equals_autograd_whatever_the_shape(
    head_width: int, heads: int, seed: int, **sizes
) -> None:
    case = Case(**sizes, heads=heads, width=heads * head_width, seed=seed)
    found, expected = case.find(), case.expect()
    assert [len(one) for one in found] == sizes["counts"]
    # A gradient of a saturated softmax is the small difference of large terms: those set the rounding.
    limit = 1e-11 * max(1.0, float(torch.cat(expected).abs().max()))
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < limit


def test_single_precision_at_full_width() -> None:
    sizes = {"width": 768, "heads": 12, "hidden": 3072, "joint": 512}
    case = Case(**sizes, patches=48, counts=[2], words=25, scale=100.0, activation="quick_gelu", seed=2)
    expected = case.expect()
    assert error(case.find(dtype=torch.float32), expected) < 2e-5


def test_cutting_up_large_arrays_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(**SMALL, counts=[3, 3, 1, 3, 1], activation="gelu", seed=3)
    whole = case.find()
    one_class = SMALL["patches"] * SMALL["hidden"]
    for largest in (1, one_class, 2 * one_class, 7 * one_class):
        monkeypatch.setattr(gradcam, "LARGEST_ARRAY", largest)
        assert error(case.find(), whole) < 1e-13


class LargestArray(TorchDispatchMode):
    """Notes the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_array_grows_with_classes_times_mlp_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcam, "LARGEST_ARRAY", 2 * SMALL["patches"] * SMALL["hidden"])
    largest = []
    for count in (2, 8):
        case = Case(**SMALL, counts=[count], activation="gelu", seed=4)
        with LargestArray() as seen:
            case.find()
        largest.append(seen.elements)
    assert largest[0] == largest[1]


def test_class_free_products_are_done_once() -> None:
    """Each further class costs the same, and less than the first by at least the class-free product."""

    def flops(count: int) -> int:
        case = Case(**SMALL, counts=[count], activation="gelu", seed=5)
        with FlopCounterMode(display=False) as counter:
            case.find()
        return counter.get_total_flops()

    costs = [flops(count) for count in (1, 2, 3, 4)]
    steps = {later - earlier for earlier, later in pairwise(costs)}
    width, hidden, patches = SMALL["width"], SMALL["hidden"], SMALL["patches"]
    assert len(steps) == 1
    products = 2 * patches * (width * hidden + width * width + (1 + patches) * (width + SMALL["heads"]))
    assert products <= steps.pop() < 1.2 * products


def test_absent_classes_are_out_of_the_softmax_and_background_words_are_in() -> None:
    case = Case(**SMALL, counts=[2], activation="gelu", seed=6)
    before = case.find()
    absent = next(label for label in range(case.num_labels) if label not in case.present[0])
    case.prototypes[absent] *= -1
    assert error(case.find(), before) == 0
    case.prototypes[case.num_labels] *= -1
    assert error(case.find(), before) > 1e-3


def test_probability_is_the_logarithm_times_the_probability() -> None:
    case = Case(**SMALL, counts=[3], activation="gelu", seed=7)

    def log_probabilities(trace: BlockTrace, *arguments, **options) -> list[torch.Tensor]:
        _, head, prototypes, present = arguments
        return [gradcam.class_log_probabilities(trace.outputs[0], head, prototypes, present[0], **options)]

    (logs,) = case.find(log_probabilities)
    (by_log,), (by_probability,) = case.find(), case.find(score="probability")
    torch.testing.assert_close(by_probability, by_log * logs.exp()[:, None], rtol=1e-12, atol=0)


def test_maps_are_weighted_sums_rectified_and_scaled() -> None:
    generator = torch.Generator().manual_seed(8)
    normed = torch.randn(1 + 15, 6, generator=generator)
    weights = torch.randn(3, 6, generator=generator)
    found = gradcam.cams_from_weights(normed, weights, (3, 5)).numpy()
    for one, row in zip(found, weights.double().numpy(), strict=True):
        sums = np.maximum(normed.double().numpy()[1:] @ row, 0).reshape(3, 5)
        np.testing.assert_allclose(one, (sums - sums.min()) / (sums.max() - sums.min()), atol=1e-6)


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_maps_ignore_a_positive_factor_but_not_a_sign(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    normed = torch.randn(13, 6, generator=generator)
    weights = torch.randn(2, 6, generator=generator)
    cams = gradcam.cams_from_weights(normed, weights, (4, 3))
    scaled = gradcam.cams_from_weights(normed, factor * weights, (4, 3))
    torch.testing.assert_close(scaled, cams, atol=1e-3, rtol=0)
    flipped = gradcam.cams_from_weights(normed, -weights, (4, 3))
    assert float((flipped * cams).flatten(1).sum(1).max()) < float((cams * cams).flatten(1).sum(1).min())


def test_maps_without_positive_evidence_are_zero() -> None:
    normed = torch.ones(5, 4)
    cams = gradcam.cams_from_weights(normed, torch.stack([-torch.ones(4), torch.zeros(4)]), (2, 2))
    assert cams.tolist() == torch.zeros(2, 2, 2).tolist()


def test_maps_are_scaled_one_by_one() -> None:
    maps = torch.tensor([[[-3.0, -1.0], [0.0, 1.0]], [[5.0, 5.0], [7.0, 6.0]], [[2.0, 2.0], [2.0, 2.0]]])
    expected = [[[0.0, 0.5], [0.75, 1.0]], [[0.0, 0.0], [1.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]
    torch.testing.assert_close(gradcam.minmax(maps), torch.tensor(expected), atol=1e-6, rtol=0)

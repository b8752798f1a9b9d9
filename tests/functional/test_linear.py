"""Linear maps against float64, by whichever library they go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vpl_lightning.functional import linear as linear_module
from vpl_lightning.functional.linear import linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(linear_module, "ONEDNN", request.param)
    monkeypatch.setattr(linear_module, "SMALLEST_PRODUCT", 1)
    return bool(request.param)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(96,), (50, 96), (3, 17, 96), (2, 2, 5, 96)])
def test_equals_float64(onednn: bool, shape: tuple[int, ...], transposed: bool, biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    weight = torch.randn(96, 40, generator=draw).T if transposed else torch.randn(40, 96, generator=draw)
    bias = torch.randn(40, generator=draw) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.layout is torch.strided
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-5)


@needs_onednn
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), first=st.integers(0, 3), width=st.integers(1, 64), outputs=st.integers(1, 64))
def test_reads_views(rows: int, first: int, width: int, outputs: int) -> None:
    """Patches are a slice of the tokens, heads and thirds slices of their width."""
    draw = torch.Generator().manual_seed(rows * 64 + width)
    x = torch.randn(2, first + rows, 80, generator=draw)[:, first:, 5 : 5 + width]
    weight = torch.randn(outputs, 80, generator=draw)[:, 16 : 16 + width]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "ONEDNN", True)
        patch.setattr(linear_module, "SMALLEST_PRODUCT", 1)
        found = linear(x, weight)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=5e-5)


@needs_onednn
def test_only_large_float32_products_without_a_graph_take_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, original = [], F.linear

    def spy(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        taken.append(x.is_mkldnn)
        return original(x, *rest)

    monkeypatch.setattr(linear_module, "ONEDNN", True)
    monkeypatch.setattr(linear_module.F, "linear", spy)
    x, weight = torch.randn(64, 256), torch.randn(128, 256)
    linear(x, weight)
    linear(x[:63], weight)
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    linear(x.clone().requires_grad_(), weight)
    with torch.no_grad():
        linear(x, weight.clone().requires_grad_())
    with torch.inference_mode():
        linear(x, weight)
    assert taken == [True, False, False, False, False, True, True]


def test_has_a_gradient() -> None:
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(128, 256)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))

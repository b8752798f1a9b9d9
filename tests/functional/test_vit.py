"""The block arithmetic against open_clip's blocks and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import tiny_clip
from vpl_lightning.functional import vit


@pytest.fixture(scope="module")
def block() -> nn.Module:
    return tiny_clip().visual.transformer.resblocks[1]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(3, 11, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_forward_equals_open_clips(block: nn.Module, tokens: torch.Tensor) -> None:
    weights = vit.block_weights(block)
    expected = block(tokens)
    averaged = block.attn(*3 * (block.ln_1(tokens),), need_weights=True)[1]
    outputs, attention = vit.forward_block_with_attention(tokens, weights)
    trace = vit.trace_block(tokens, weights)
    for found in (outputs, trace.outputs, vit.forward_block(tokens, weights)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention, averaged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.attention.mean(1), averaged, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_trace_takes_a_stand_in_for_the_normed_tokens(block: nn.Module, tokens: torch.Tensor) -> None:
    weights = vit.block_weights(block)
    normed = torch.randn_like(tokens)
    middle = tokens + block.attn(*3 * (normed,), need_weights=False)[0]
    expected = middle + block.mlp(block.ln_2(middle))
    torch.testing.assert_close(
        vit.trace_block(tokens, weights, normed=normed).outputs, expected, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_value_path_is_attention_to_oneself(block: nn.Module, tokens: torch.Tensor) -> None:
    weights = vit.block_weights(block)
    alone = block.ln_1(tokens).reshape(-1, 1, 64)
    expected = block.attn(*3 * (alone,), need_weights=False)[0].reshape(tokens.shape)
    found = vit.value_path(vit.trace_block(tokens, weights), weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activation_slope_is_the_derivative(activation: vit.Activation) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)[None]
    (slope,) = torch.autograd.grad(vit.activate(x, activation).sum(), x)
    torch.testing.assert_close(vit.activation_slope(x.detach(), activation), slope)


def test_cast_block_keeps_norms_exact(block: nn.Module) -> None:
    cast = vit.cast_block(vit.block_weights(block), torch.bfloat16)
    assert cast.in_weight.dtype == cast.proj_bias.dtype == torch.bfloat16
    assert cast.norm_1.weight.dtype == torch.float32
    torch.testing.assert_close(
        cast.in_weight.float(), block.attn.in_proj_weight.detach(), rtol=1e-2, atol=1e-3
    )


def test_dense_features_drop_the_class_token(tokens: torch.Tensor) -> None:
    norm = nn.LayerNorm(64)
    projection = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    head = vit.HeadWeights(vit.norm_weights(norm), projection)
    raw = vit.dense_features(tokens, head, normalise=False)
    torch.testing.assert_close(raw, norm(tokens)[:, 1:] @ projection)
    unit = vit.dense_features(tokens, head)
    torch.testing.assert_close(unit, raw / raw.norm(dim=-1, keepdim=True))


def test_strange_blocks_are_refused(block: nn.Module) -> None:
    with pytest.raises(AttributeError, match=r"no parameter attn\.in_proj_weight"):
        vit.block_weights(nn.Linear(2, 2))
    approximate = tiny_clip(
        quick_gelu=False, act_kwargs={"approximate": "tanh"}
    ).visual.transformer.resblocks[0]
    with pytest.raises(ValueError, match="unknown activation"):
        vit.block_weights(approximate)
    assert vit.block_weights(approximate, activation="gelu").activation == "gelu"
    assert vit.block_weights(block, heads=4).heads == 4

"""Geometry of the decoder, and its heads against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpl_lightning.decoder import DecoderBlock, DecoderSpec, LayerFusion, SegmentationDecoder
from vpl_lightning.errors import ConfigurationError

N, M, D, V, LAYERS = 4, 3, 8, 12, 2
SMALL = {"width": 16, "blocks": 1, "heads": 2}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def prototypes(words: int = M) -> Tensor:
    return F.normalize(torch.randn(N + words, D, generator=torch.Generator().manual_seed(0)), dim=1)


def hidden(batch: int = 2, grid: tuple[int, int] = (3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, V, *grid, generator=generator) for _ in range(LAYERS)]


def decoder(words: int = M, *, embed: bool = True, **settings: object) -> SegmentationDecoder:
    torch.manual_seed(0)
    spec = DecoderSpec(**{**SMALL, **settings})
    return SegmentationDecoder(V, LAYERS, prototypes=prototypes(words), num_labels=N, spec=spec, embed=embed)


def test_parameters_of_weclip():
    """Vision transformer B/16: 11 layers of width 768; 21 classes."""
    spec = DecoderSpec(head="linear")
    whole = SegmentationDecoder(
        768, 11, prototypes=torch.zeros(45, 512), num_labels=20, spec=spec, embed=False
    )
    assert count(whole.fusion.reduce) == 2_889_216
    assert count(whole.fusion.mix) == 721_152
    assert count(whole.blocks) == 2_369_280
    assert count(whole.classify) == 5_397
    assert count(whole) == 5_985_045


def test_fusion_is_an_mlp_a_layer_and_a_linear_mix():
    torch.manual_seed(0)
    fusion, layers = LayerFusion(V, LAYERS, width=6, dropout=0.1).eval(), hidden()
    y, x = 2, 4
    reduced = [
        mlp[2](F.relu(mlp[0](layer[:, :, y, x]))) for mlp, layer in zip(fusion.reduce, layers, strict=True)
    ]
    expected = F.linear(torch.cat(reduced, 1), fusion.mix.weight[:, :, 0, 0], fusion.mix.bias)
    torch.testing.assert_close(fusion(layers)[:, :, y, x], expected)


def test_block_is_a_pre_norm_transformer_layer():
    torch.manual_seed(0)
    block, tokens = DecoderBlock(16, heads=4, mlp_ratio=4), torch.randn(2, 7, 16)
    reference = nn.TransformerEncoderLayer(
        16,
        4,
        64,
        dropout=0,
        activation=lambda x: x * torch.sigmoid(1.702 * x),
        batch_first=True,
        norm_first=True,
    )
    reference.self_attn.load_state_dict(block.attention.state_dict())
    reference.norm1.load_state_dict(block.norm_1.state_dict())
    reference.norm2.load_state_dict(block.norm_2.state_dict())
    reference.linear1.load_state_dict(block.mlp[0].state_dict())
    reference.linear2.load_state_dict(block.mlp[2].state_dict())
    torch.testing.assert_close(block(tokens), reference(tokens))


def test_no_position_but_the_neighbours_matter():
    model = decoder().eval()
    flipped = model([layer.flip(3) for layer in hidden()]).logits
    torch.testing.assert_close(flipped.flip(3), model(hidden()).logits)


@pytest.mark.parametrize("background", ["logsumexp", "max", "learnt"])
def test_prototype_head_is_a_softmax_over_prototypes(background: str):
    model = decoder(background_logit=background).eval()
    output = model(hidden())
    scale = 1 / 0.07
    cosines = torch.stack(
        [F.cosine_similarity(output.embedding, row[None, :, None, None], dim=1) for row in prototypes()], 1
    )
    torch.testing.assert_close(output.logits[:, 1:], scale * cosines[:, :N])
    if background == "logsumexp":
        shares = F.softmax(scale * cosines, 1)
        torch.testing.assert_close(F.softmax(output.logits, 1)[:, 0], shares[:, N:].sum(1))
    elif background == "max":
        torch.testing.assert_close(output.logits[:, 0], scale * cosines[:, N:].amax(1))
    else:
        vector = model.background[0][None, :, None, None]
        expected = scale * F.cosine_similarity(output.embedding, vector, dim=1)
        torch.testing.assert_close(output.logits[:, 0], expected)


def test_prototypes_are_frozen_and_saved():
    model = decoder()
    model(hidden()).logits.sum().backward()
    assert "prototypes" in model.state_dict()
    assert not model.prototypes.requires_grad
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("embed", [True, False])
def test_linear_head(embed: bool):
    model = decoder(embed=embed, head="linear")
    output = model(hidden(grid=(4, 2)))
    assert output.logits.shape == (2, N + 1, 4, 2)
    assert (output.embedding is not None) == embed
    if embed:
        torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(2, 4, 2))


def test_scale_stops_at_100():
    model = decoder().eval()
    before = model(hidden()).logits[:, 1:]
    model.log_scale.data.fill_(math.log(1e4))
    torch.testing.assert_close(model(hidden()).logits[:, 1:], before * 0.07 * 100)


def test_half_precision_around_it_leaves_logits_float32():
    model = decoder().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(hidden())
    assert output.logits.dtype == output.embedding.dtype == torch.float32
    torch.testing.assert_close(output.logits, model(hidden()).logits, atol=0.5, rtol=0.05)


def test_background_words_are_needed_or_learnt():
    with pytest.raises(ConfigurationError, match=r"background_logit='max' needs background words"):
        decoder(words=0, background_logit="max")
    assert decoder(words=0, background_logit="learnt")(hidden()).logits.shape[1] == N + 1
    assert decoder(words=0, head="linear")(hidden()).logits.shape[1] == N + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 10, "heads": 4}, r"decoder.width=10 cannot be cut into decoder.heads=4"),
        ({"dropout": 1.0}, r"decoder.dropout=1.0"),
        ({"blocks": -1}, r"decoder.blocks=-1"),
        ({"heads": 0}, r"decoder.heads=0"),
        ({"head": "mlp"}, r"decoder.head='mlp'"),
        ({"background_logit": "sum"}, r"decoder.background_logit='sum'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str):
    with pytest.raises(ConfigurationError, match=message):
        DecoderSpec(**settings)

"""The frozen encoder against open_clip, against OpenAI-style code and against a numpy reference."""

from __future__ import annotations

import copy

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.models import tiny_clip
from tests.openai_style import Block, PairBlock, openai_style
from vpl_lightning.clip import CLIPEncoder, resize_to_patches
from vpl_lightning.errors import ConfigurationError, DataError


def random_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def numpy_forward(
    model: nn.Module, pixels: np.ndarray, *, patch: int, heads: int, quick: bool, half: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens before the first and after each block, and head-averaged attention of each, in float64."""
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    count, _, height, width = pixels.shape
    h, w = height // patch, width // patch

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[f"visual.{name}.weight"] + state[f"visual.{name}.bias"]

    kernel = state["visual.conv1.weight"]
    cells = pixels.reshape(count, 3, h, patch, w, patch).astype(np.float64)
    patches = np.einsum("bchpwq,vcpq->bhwv", cells, kernel).reshape(count, h * w, -1)
    table = state["visual.positional_embedding"]
    side = int(np.sqrt(len(table) - 1))
    if (h, w) != (side, side):
        planes = table[1:].reshape(side, side, -1)
        resized = np.stack(
            [
                cv2.resize(planes[..., channel], (w, h), interpolation=cv2.INTER_LINEAR)
                for channel in range(planes.shape[-1])
            ],
            axis=-1,
        )
        table = np.concatenate([table[:1], resized.reshape(h * w, -1)])
        table = table.astype(np.float16).astype(np.float64) if half else table
    first = np.broadcast_to(state["visual.class_embedding"], (count, 1, kernel.shape[0]))
    x = norm(np.concatenate([first, patches], axis=1) + table, "ln_pre")
    tokens, maps = [x], []
    for index in range(len(model.visual.transformer.resblocks)):
        name = f"transformer.resblocks.{index}"
        a = norm(x, f"{name}.ln_1")
        qkv = a @ state[f"visual.{name}.attn.in_proj_weight"].T + state[f"visual.{name}.attn.in_proj_bias"]
        q, k, v = (
            part.reshape(count, -1, heads, part.shape[-1] // heads) for part in np.split(qkv, 3, axis=-1)
        )
        scores = np.einsum("bqgd,bkgd->bgqk", q, k) / np.sqrt(q.shape[-1])
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        mixed = np.einsum("bgqk,bkgd->bqgd", attention, v).reshape(x.shape)
        x = (
            x
            + mixed @ state[f"visual.{name}.attn.out_proj.weight"].T
            + state[f"visual.{name}.attn.out_proj.bias"]
        )
        hidden = norm(x, f"{name}.ln_2") @ state[f"visual.{name}.mlp.c_fc.weight"].T
        hidden = torch.from_numpy(hidden + state[f"visual.{name}.mlp.c_fc.bias"])
        hidden = (hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)).numpy()
        x = x + hidden @ state[f"visual.{name}.mlp.c_proj.weight"].T + state[f"visual.{name}.mlp.c_proj.bias"]
        tokens.append(x)
        maps.append(attention.mean(1))
    return tokens, maps


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"quick_gelu": False}, {"pool_type": "avg"}, {"no_ln_pre": True}])
def test_pooled_output_equals_open_clip(options: dict[str, object]) -> None:
    model = tiny_clip(**options)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(CLIPEncoder(model).encode_image(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [Block, PairBlock])
def test_openai_style_models_equal_their_own_forward(block: type[Block]) -> None:
    model = openai_style(tiny_clip().state_dict(), block=block)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.encode_image(images)
    encoder = CLIPEncoder(model)
    torch.testing.assert_close(encoder.encode_image(images), expected, rtol=1e-5, atol=1e-5)
    texts = ["a photo of a cat.", "a photo of a dog."]
    torch.testing.assert_close(
        encoder.encode_text(texts), CLIPEncoder(tiny_clip()).encode_text(texts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("quick", "half"), [(True, True), (True, False), (False, False)])
def test_other_sizes_equal_a_numpy_reference(quick: bool, half: bool) -> None:
    model = tiny_clip(quick_gelu=quick)
    encoder = CLIPEncoder(model, half_positions=half, attention_blocks=3)
    images = random_images(2, 40, 56)
    pixels = encoder.normalise(images)
    tokens, maps = numpy_forward(model, pixels.numpy(), patch=8, heads=2, quick=quick, half=half)
    encoded = encoder.encode(images)
    tolerance = 3e-3 if half else 2e-4
    assert encoded.grid == (5, 7)
    assert encoded.attention_blocks == 3
    close(encoded.tokens, tokens[-2], tolerance)
    close(encoded.attention, maps[1] + maps[2], tolerance)
    trace = encoder.trace(encoded.tokens)
    close(trace.outputs, tokens[-1], tolerance)
    close(trace.attention.mean(1), maps[3], tolerance)
    for found, expected in zip(encoder.hidden(images), tokens[1:-1], strict=True):
        close(found, expected[:, 1:].transpose(0, 2, 1).reshape(2, 64, 5, 7), tolerance)


def test_attention_covers_the_blocks_before_the_last() -> None:
    images = random_images(2, 24, 48)
    for asked, kept in ((1, 1), (2, 2), (3, 3), (8, 4)):
        encoded = CLIPEncoder(tiny_clip(), attention_blocks=asked).encode(images)
        assert encoded.attention_blocks == kept
        torch.testing.assert_close(encoded.attention.sum(-1), torch.full((2, 19), kept - 1.0))


def test_last_block_continues_the_forward(tiny_encoder: CLIPEncoder) -> None:
    images = random_images(2, 40, 24)
    trace = tiny_encoder.trace(tiny_encoder.encode(images).tokens)
    head = tiny_encoder.head
    pooled = F.layer_norm(trace.outputs[:, 0], (64,), head.norm.weight, head.norm.bias) @ head.projection
    torch.testing.assert_close(pooled, tiny_encoder.encode_image(images), rtol=1e-5, atol=1e-5)


def test_dense_features(tiny_clip: nn.Module, tiny_encoder: CLIPEncoder) -> None:
    encoded = tiny_encoder.encode(random_images(2, 32, 48))
    trace = tiny_encoder.trace(encoded.tokens)
    visual = tiny_clip.visual
    block = visual.transformer.resblocks[-1]
    with torch.no_grad():
        weight, bias = block.attn.in_proj_weight[-64:], block.attn.in_proj_bias[-64:]
        value = block.attn.out_proj(F.linear(block.ln_1(encoded.tokens), weight, bias))
        for kind, tokens in (
            ("value", value),
            ("final", block(encoded.tokens)),
            ("penultimate", encoded.tokens),
        ):
            expected = F.normalize((visual.ln_post(tokens) @ visual.proj)[:, 1:], dim=-1)
            torch.testing.assert_close(tiny_encoder.dense(encoded, kind), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                tiny_encoder.dense(encoded.tokens, kind, trace), tiny_encoder.dense(encoded, kind)
            )
        mean = visual.ln_post(trace.outputs)[:, 1:].mean(1) @ visual.proj
    torch.testing.assert_close(tiny_encoder.pooled(trace.outputs), mean, rtol=1e-4, atol=1e-5)
    with pytest.raises((ConfigurationError, TypeError), match=r"value.*final.*penultimate"):
        tiny_encoder.dense(encoded, "key")  # type: ignore[arg-type]


def test_inputs_of_every_kind_agree(tiny_encoder: CLIPEncoder) -> None:
    images = random_images(2, 16, 24)
    expected = tiny_encoder.encode(images).tokens
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(tiny_encoder.encode(channels_first).tokens, expected)
    torch.testing.assert_close(tiny_encoder.encode(tiny_encoder.normalise(images)).tokens, expected)
    single = tiny_encoder.encode(images[1:]).tokens
    torch.testing.assert_close(single, expected[1:], rtol=1e-4, atol=1e-5)


def test_normalise_uses_clips_statistics(tiny_encoder: CLIPEncoder) -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    images = random_images(1, 8, 8)
    expected = (images[0] / 255 - np.array(OPENAI_DATASET_MEAN)) / np.array(OPENAI_DATASET_STD)
    np.testing.assert_allclose(
        tiny_encoder.normalise(images)[0].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-6
    )


def test_statistics_of_the_model_win() -> None:
    model = tiny_clip()
    model.visual.image_mean, model.visual.image_std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    grey = np.full((1, 8, 8, 3), 255, np.uint8)
    assert CLIPEncoder(model).normalise(grey).unique().tolist() == [2.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 7, 16]))
def test_resize_rounds_up(height: int, width: int, patch: int) -> None:
    image = random_images(1, height, width)[0]
    resized = resize_to_patches(image, patch)
    assert resized.dtype == np.uint8
    assert [side % patch for side in resized.shape[:2]] == [0, 0]
    assert 0 <= resized.shape[0] - height < patch
    assert 0 <= resized.shape[1] - width < patch
    size = (resized.shape[1], resized.shape[0])
    np.testing.assert_array_equal(
        resized, np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    )
    assert not np.shares_memory(resized, image)


def test_encoder_is_frozen() -> None:
    encoder = CLIPEncoder(tiny_clip())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.train().modules())
    encoded = encoder.encode(random_images(1, 16, 16))
    assert not encoded.tokens.requires_grad
    assert encoder.encode_image(torch.randn(1, 3, 16, 16, requires_grad=True)).grad_fn is None


def test_trace_is_differentiable_in_its_tokens(tiny_clip: nn.Module, tiny_encoder: CLIPEncoder) -> None:
    tokens = tiny_encoder.encode(random_images(1, 16, 16)).tokens.requires_grad_()
    tiny_encoder.trace(tokens).outputs.square().sum().backward()
    again = tokens.detach().clone().requires_grad_()
    tiny_clip.visual.transformer.resblocks[-1](again).square().sum().backward()
    torch.testing.assert_close(tokens.grad, again.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_reduced_precision_is_close_and_ends_in_float32(precision: str, tolerance: float) -> None:
    images = random_images(2, 32, 40)
    exact = CLIPEncoder(tiny_clip())
    reduced = CLIPEncoder(tiny_clip(), precision=precision)  # type: ignore[arg-type]
    encoded, expected = reduced.encode(images), exact.encode(images)
    assert encoded.tokens.dtype == encoded.attention.dtype == torch.float32
    assert reduced.last_block.in_weight.dtype == reduced.trace(encoded.tokens).outputs.dtype == torch.float32
    error = (encoded.tokens - expected.tokens).norm() / expected.tokens.norm()
    assert 0 < error < tolerance
    assert (encoded.attention - expected.attention).abs().max() < tolerance
    assert reduced.fingerprint() != exact.fingerprint()


def test_autocast_outside_changes_nothing(tiny_encoder: CLIPEncoder) -> None:
    images = random_images(1, 16, 24)
    expected = tiny_encoder.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiny_encoder.encode(images)
        trace = tiny_encoder.trace(found.tokens)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(trace.outputs, tiny_encoder.trace(expected.tokens).outputs)


def test_casting_the_module_refreshes_what_it_remembers() -> None:
    encoder = CLIPEncoder(tiny_clip())
    images = random_images(1, 16, 24)
    expected = encoder.encode(images).tokens
    halved = encoder.half()
    assert halved.last_block.fc_weight.dtype == torch.float32
    found = halved.float().encode(images).tokens
    assert 0 < (found - expected).abs().max() < 0.1
    twin = copy.deepcopy(encoder)
    torch.testing.assert_close(twin.encode(images).tokens, found)


def test_half_precision_host_becomes_float32() -> None:
    model = tiny_clip().half()
    encoder = CLIPEncoder(model)
    assert encoder.encode(random_images(1, 16, 16)).tokens.dtype == torch.float32


class Stem(nn.Module):
    def __init__(self, stride: int, width: int) -> None:
        super().__init__()
        self.stride = stride
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, width, 2, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_stem_may_be_any_module() -> None:
    model = tiny_clip()
    model.visual.conv1 = Stem(8, 64)
    encoder = CLIPEncoder(model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(encoder.encode_image(images), expected, rtol=1e-5, atol=1e-5)
    assert encoder.encode(torch.randn(1, 3, 16, 40)).grid == (2, 5)


def test_stem_of_unknown_patch_size_needs_the_argument() -> None:
    model = tiny_clip()
    model.visual.conv1 = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 64, 2, 2))
    with pytest.raises(ConfigurationError, match="patch_size="):
        CLIPEncoder(model)
    assert CLIPEncoder(model, patch_size=8).encode(torch.randn(1, 3, 16, 16)).grid == (2, 2)
    with pytest.raises(ConfigurationError, match="the stem made"):
        CLIPEncoder(model, patch_size=4).encode(torch.randn(1, 3, 16, 16))


def test_arguments_override_what_the_blocks_say() -> None:
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    state = tiny_clip(heads=4, quick_gelu=False).state_dict()
    wrong = tiny_clip(heads=2, quick_gelu=True)
    wrong.load_state_dict(state)
    right = CLIPEncoder(tiny_clip(heads=4, quick_gelu=False)).encode_image(images)
    assert not torch.allclose(CLIPEncoder(copy.deepcopy(wrong)).encode_image(images), right, atol=1e-3)
    found = CLIPEncoder(wrong, heads=4, quick_gelu=False).encode_image(images)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_wrong_use_is_refused(tiny_encoder: CLIPEncoder) -> None:
    with pytest.raises(DataError, match="30 x 32 px does not fit patches of 8 px"):
        tiny_encoder.encode(random_images(1, 30, 32))
    with pytest.raises((ConfigurationError, TypeError), match=r"float32.*bfloat16.*float16"):
        CLIPEncoder(tiny_clip(), precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="attention_blocks is 0"):
        CLIPEncoder(tiny_clip(), attention_blocks=0)
    with pytest.raises(ConfigurationError, match="cannot be cut into 7 heads"):
        CLIPEncoder(tiny_clip(), heads=7)
    with pytest.raises(ConfigurationError, match="Linear has no visual"):
        CLIPEncoder(nn.Linear(2, 2))
    skewed = tiny_clip()
    skewed.visual.grid_size = (3, 5)
    with pytest.raises(ConfigurationError, match=r"16 patches, which is no grid of \(3, 5\)"):
        CLIPEncoder(skewed)
    with pytest.raises(ConfigurationError, match="1 block"):
        CLIPEncoder(tiny_clip(layers=1))
    for options, message in (
        ({"ls_init_value": 0.1}, "ls_1.gamma"),
        ({"block_type": "custom", "qk_norm": True}, "attn.ln_k"),
        ({"attentional_pool": True}, "pools by attention"),
        ({"pool_type": "avg", "final_ln_after_pool": True}, "unknown way"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            CLIPEncoder(tiny_clip(**options))


def test_custom_attention_class_of_open_clip() -> None:
    model = tiny_clip(block_type="custom")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(CLIPEncoder(model).encode_image(images), expected, rtol=1e-5, atol=1e-5)


def test_many_grids_give_the_same_as_a_fresh_encoder(tiny_encoder: CLIPEncoder) -> None:
    first = tiny_encoder.encode(random_images(1, 8, 8)).tokens
    for side in range(8, 8 * 24, 8):
        tiny_encoder.encode(random_images(1, side, 16))
    torch.testing.assert_close(tiny_encoder.encode(random_images(1, 8, 8)).tokens, first)


def test_properties(tiny_encoder: CLIPEncoder) -> None:
    assert (tiny_encoder.patch_size, tiny_encoder.width, tiny_encoder.joint_width, tiny_encoder.depth) == (
        8,
        64,
        32,
        4,
    )
    assert tiny_encoder.logit_scale == pytest.approx(100, rel=1e-3)
    assert tiny_encoder.device == torch.device("cpu")
    assert tiny_encoder.resize(np.zeros((9, 8, 3), np.uint8)).shape == (16, 8, 3)

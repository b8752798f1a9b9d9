"""Every container of CLIP weights, written for real, read back; and every wrong one refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models import tiny_clip
from tests.openai_style import openai_style
from vpl_lightning.clip import CLIPEncoder, weights
from vpl_lightning.errors import WeightsError

HEADS = {"heads": 2}
SMALL = {"vocab_size": 64, "context_length": 8}
"""No test of these reads text, and the token table would be most of each file."""
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return tiny_clip(**SMALL).state_dict()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with torch.no_grad():
        return tiny_clip(**SMALL).encode_image(IMAGES)


def save_archive(path: Path, model: nn.Module) -> Path:
    """Trace a model as OpenAI did and save the TorchScript archive."""
    text = torch.arange(model.positional_embedding.shape[0])[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, (IMAGES.to(next(model.parameters()).dtype), text)), str(path))
    return path


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def check(encoder: CLIPEncoder, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(encoder.encode_image(IMAGES), expected, rtol=tolerance, atol=tolerance)


def test_torchscript_archive(tmp_path: Path, state: State, expected: Tensor) -> None:
    encoder = CLIPEncoder.from_checkpoint(save_archive(tmp_path / "ViT.pt", openai_style(state)), **HEADS)
    check(encoder, expected)
    assert encoder.last_block.activation == "quick_gelu"


def test_half_precision_archive(tmp_path: Path, state: State, expected: Tensor) -> None:
    halves = {key: value.half().float() for key, value in state.items()}
    model = openai_style(halves)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        norm.half()
    encoder = CLIPEncoder.from_checkpoint(save_archive(tmp_path / "ViT.pt", model), **HEADS)
    assert encoder.last_block.in_weight.dtype == torch.float32
    check(encoder, CLIPEncoder(openai_style(halves)).encode_image(IMAGES))
    check(encoder, expected, 2e-2)


def test_archive_of_a_gelu_model_is_recognised(tmp_path: Path) -> None:
    model = tiny_clip(quick_gelu=False, **SMALL)
    path = save_archive(tmp_path / "ViT.pt", openai_style(model.state_dict(), activation=nn.GELU))
    encoder = CLIPEncoder.from_checkpoint(path, **HEADS)
    assert encoder.last_block.activation == "gelu"
    check(encoder, model.encode_image(IMAGES).detach())
    with pytest.raises(WeightsError, match=r"trained with GELU .*but quick_gelu=True"):
        CLIPEncoder.from_checkpoint(path, quick_gelu=True, **HEADS)


def test_archive_cannot_be_told_to_be_gelu(tmp_path: Path, state: State) -> None:
    path = save_archive(tmp_path / "ViT.pt", openai_style(state))
    with pytest.raises(WeightsError, match=r"QuickGELU .*but quick_gelu=False"):
        CLIPEncoder.from_checkpoint(path, quick_gelu=False, **HEADS)


@pytest.mark.parametrize("markers", [True, False])
def test_openai_state_dict_is_known_by_markers_or_order(
    tmp_path: Path, state: State, expected: Tensor, markers: bool
) -> None:
    model = openai_style(state, markers=markers)
    check(CLIPEncoder.from_checkpoint(save(tmp_path / "a.pt", model.state_dict()), **HEADS), expected)


def test_open_clip_state_dict_needs_the_argument(tmp_path: Path, state: State, expected: Tensor) -> None:
    path = save(tmp_path / "a.pt", state)
    with pytest.raises(WeightsError, match="pass quick_gelu=True or quick_gelu=False"):
        CLIPEncoder.from_checkpoint(path, **HEADS)
    check(CLIPEncoder.from_checkpoint(path, quick_gelu=True, **HEADS), expected)
    wrong = CLIPEncoder.from_checkpoint(path, quick_gelu=False, **HEADS)
    assert not torch.allclose(wrong.encode_image(IMAGES), expected, atol=1e-3)


WRAPPERS: list[Callable[[State], Any]] = [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_state_dicts(
    tmp_path: Path, state: State, expected: Tensor, wrap: Callable[[State], Any]
) -> None:
    model = openai_style(state, markers=False)
    check(CLIPEncoder.from_checkpoint(save(tmp_path / "a.pt", wrap(model.state_dict())), **HEADS), expected)


def test_open_clip_config_beside_the_file(tmp_path: Path, state: State, expected: Tensor) -> None:
    path = save(tmp_path / "open_clip_pytorch_model.bin", state)
    told = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 1}},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    encoder = CLIPEncoder.from_checkpoint(path)
    check(encoder, expected)
    assert encoder.mean == (0.5, 0.5, 0.5)
    assert encoder.std == (0.25, 0.25, 0.25)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"open_clip_config.json cannot be read"):
        CLIPEncoder.from_checkpoint(path)


def metadata(**changes: str) -> dict[str, str]:
    own = {"format": "vpl_lightning.clip/1", "quick_gelu": "true", "vision_heads": "2", "text_heads": "1"}
    return own | changes


def contiguous(state: State) -> State:
    return {key: value.contiguous().clone() for key, value in state.items()}


def test_safetensors_with_metadata(tmp_path: Path, state: State, expected: Tensor) -> None:
    save_file(contiguous(state), tmp_path / "a.safetensors", metadata())
    check(CLIPEncoder.from_checkpoint(tmp_path / "a.safetensors"), expected)


def test_safetensors_without_metadata(tmp_path: Path, state: State, expected: Tensor) -> None:
    path = tmp_path / "a.safetensors"
    save_file(contiguous(state), path)
    with pytest.raises(WeightsError, match="pass quick_gelu"):
        CLIPEncoder.from_checkpoint(path, **HEADS)
    check(CLIPEncoder.from_checkpoint(path, quick_gelu=True, **HEADS), expected)
    save_file(contiguous(openai_style(state).state_dict()), path)
    check(CLIPEncoder.from_checkpoint(path, **HEADS), expected)


def sparse(state: State, words: list[str]) -> State:
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=77)(words)
    ids = tokens.unique()
    kept = {key: value for key, value in contiguous(state).items() if key != "token_embedding.weight"}
    rows = state["token_embedding.weight"][ids]
    return kept | {"token_embedding.ids": ids.int(), "token_embedding.rows": rows.contiguous()}


def test_sparse_token_table(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    full_table = tiny_clip().state_dict()
    save_file(sparse(full_table, ["a photo of a cat.", "a dog"]), path, metadata(vocab_size="49408"))
    encoder = CLIPEncoder.from_checkpoint(path)
    texts = ["a photo of a dog.", "a cat"]
    full = CLIPEncoder(tiny_clip()).encode_text(texts)
    torch.testing.assert_close(encoder.encode_text(texts), full, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="1 of 2 prompts .* never trained on, such as 'a photo of a zebra'"):
        encoder.encode_text(["a photo of a cat", "a photo of a zebra"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "vpl_lightning.clip/2"}, "this release reads 'vpl_lightning.clip/1'"),
        ({"vocab_size": "100"}, "token table"),
        ({"vocab_size": "many"}, "metadata vocab_size is 'many'"),
        ({"quick_gelu": "yes"}, "metadata quick_gelu is 'yes'"),
        ({}, "vocab_size None"),
        ({"vision_heads": "0", "vocab_size": "49408"}, "metadata vision_heads is '0'"),
        ({"vision_heads": "5", "vocab_size": "49408"}, "width of 64 cannot be cut into 5 heads"),
    ],
)
def test_wrong_metadata(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(sparse(tiny_clip().state_dict(), ["a cat"]), path, metadata(**changes))
    with pytest.raises(WeightsError, match=message):
        CLIPEncoder.from_checkpoint(path)


def test_fingerprint_is_that_of_the_weights_not_of_the_container(tmp_path: Path, state: State) -> None:
    save_file(contiguous(state), tmp_path / "a.safetensors", metadata())
    archive = save_archive(tmp_path / "ViT.pt", openai_style(state))
    first = CLIPEncoder.from_checkpoint(tmp_path / "a.safetensors").fingerprint()
    assert first == CLIPEncoder.from_checkpoint(archive, **HEADS).fingerprint()
    assert first == CLIPEncoder(tiny_clip(**SMALL)).fingerprint()
    changed = tiny_clip(**SMALL)
    changed.visual.proj.data[0, 0] += 1e-3
    others = [
        CLIPEncoder(changed),
        CLIPEncoder(tiny_clip(**SMALL), attention_blocks=2),
        CLIPEncoder(tiny_clip(**SMALL), half_positions=False),
        CLIPEncoder(tiny_clip(**SMALL), quick_gelu=False),
    ]
    prints = {encoder.fingerprint() for encoder in others}
    assert len(prints) == len(others)
    assert first not in prints


def test_geometry_is_inferred(tmp_path: Path) -> None:
    model = tiny_clip(width=128, layers=3, heads=2, patch_size=16, image_size=48, joint_width=24, **SMALL)
    path = save(tmp_path / "a.pt", model.state_dict())
    encoder = CLIPEncoder.from_checkpoint(path, quick_gelu=True)
    assert (encoder.width, encoder.depth, encoder.patch_size, encoder.joint_width) == (128, 3, 16, 24)
    assert encoder.geometry.heads == 2
    assert encoder.geometry.native_grid == (3, 3)
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        encoder.encode_image(images), model.encode_image(images).detach(), rtol=1e-5, atol=1e-5
    )


def test_loading_leaves_the_random_state_alone(tmp_path: Path, state: State) -> None:
    path = save(tmp_path / "a.pt", state)
    torch.manual_seed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    CLIPEncoder.from_checkpoint(path, quick_gelu=True, **HEADS)
    assert torch.equal(torch.rand(3), first)


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_tensor(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(shape)}


BLOCK = "visual.transformer.resblocks.1"
WRONG: list[tuple[Callable[[State], State], str]] = [
    (with_tensor("visual.layer1.0.conv1.weight", 4, 4, 1, 1), "ResNet CLIP"),
    (without("visual.proj"), r"no tensor 'visual.proj' \(V D\)"),
    (lambda _: {"a": torch.zeros(2)}, "no tensor 'visual.conv1.weight'.* and 8 more"),
    (
        with_tensor("visual.conv1.weight", 64, 3, 8, 4),
        r"conv1.weight' has shape \(64, 3, 8, 4\), expected \(V, 3, p, p\)",
    ),
    (with_tensor("visual.conv1.weight", 64, 1, 8, 8), r"\(64, 1, 8, 8\)"),
    (with_tensor("visual.conv1.weight", 64, 192), r"shape \(64, 192\), expected axes \(V 3 p p\)"),
    (with_tensor("visual.positional_embedding", 16, 64), "15 patches form no square grid"),
    (
        with_tensor("visual.positional_embedding", 17, 32),
        r"positional_embedding' has shape \(17, 32\), expected \(17, 64\)",
    ),
    (with_tensor("visual.proj", 64, 16), r"'visual.proj' has shape \(64, 16\), expected \(64, 32\)"),
    (without(f"{BLOCK}.ln_2.bias"), rf"'{BLOCK}.ln_2.bias' is missing, expected \(64,\)"),
    (with_tensor("logit_bias"), r"'logit_bias' \(\) is unknown"),
    (with_tensor(f"{BLOCK}.attn.in_proj_weight", 96, 64), r"\(96, 64\), expected \(192, 64\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_geometry_is_named(
    tmp_path: Path, state: State, change: Callable[[State], State], message: str
) -> None:
    path = save(tmp_path / "a.pt", change(state))
    with pytest.raises(WeightsError, match=message):
        CLIPEncoder.from_checkpoint(path, quick_gelu=True, **HEADS)


def test_unreadable_files_are_named(tmp_path: Path, state: State) -> None:
    with pytest.raises(WeightsError, match="no such checkpoint"):
        CLIPEncoder.from_checkpoint(tmp_path / "none.pt")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(WeightsError, match=name):
            CLIPEncoder.from_checkpoint(tmp_path / name)
    with pytest.raises(WeightsError, match="holds list"):
        CLIPEncoder.from_checkpoint(save(tmp_path / "b.pt", [1, 2]), quick_gelu=True)
    with pytest.raises(WeightsError, match="'epoch' is int, not a tensor"):
        CLIPEncoder.from_checkpoint(save(tmp_path / "c.pt", {"epoch": 3}), quick_gelu=True)
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        CLIPEncoder.from_checkpoint(save(tmp_path / "d.pt", tiny_clip(**SMALL)), quick_gelu=True)
    archive = save_archive(tmp_path / "e.pt", openai_style(state))
    broken = archive.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1)
    archive.write_bytes(broken)
    with pytest.raises(WeightsError, match=r"e\.pt"):
        CLIPEncoder.from_checkpoint(archive)


TINY_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model under a name that open_clip knows."""
    path = tmp_path_factory.mktemp("configs") / "vpl-tiny-quickgelu.json"
    path.write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(path)
    return path.stem


def test_open_clip_without_weights_warns(tiny_name: str) -> None:
    with pytest.warns(UserWarning, match="they are random"):
        encoder = CLIPEncoder.from_open_clip(tiny_name)
    assert encoder.geometry.activation == "quick_gelu"
    assert encoder.encode_text(["a cat"]).shape == (1, 32)


def test_open_clip_with_a_local_file(tmp_path: Path, state: State, expected: Tensor, tiny_name: str) -> None:
    check(CLIPEncoder.from_open_clip(tiny_name, str(save(tmp_path / "a.pt", state))), expected)
    deeper = save(tmp_path / "b.pt", tiny_clip(layers=3, **SMALL).state_dict())
    with pytest.raises(WeightsError, match=r"\(64, 8, 3\).* has \(64, 8, 4\)"):
        CLIPEncoder.from_open_clip(tiny_name, str(deeper))
    with pytest.raises(WeightsError, match="'RN50' has no plain vision transformer"):
        CLIPEncoder.from_open_clip("RN50", str(deeper))


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("ViT-B-16", "openai", "use 'ViT-B-16-quickgelu'"),
        ("ViT-B-16", "nonsense", "no weights 'nonsense' for 'ViT-B-16'.*laion400m_e31"),
        ("ViT-Z-99", "openai", "no model 'ViT-Z-99'"),
    ],
)
def test_open_clip_names_and_tags_are_checked_before_any_download(name: str, tag: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        CLIPEncoder.from_open_clip(name, pretrained=tag)


def test_failed_download_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(WeightsError, match=r"no network.*CLIPEncoder\.from_checkpoint"):
        CLIPEncoder.from_open_clip("ViT-B-16-quickgelu", pretrained="openai")


def test_embedded_clip_is_read_from_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: State
) -> None:
    assert weights.EMBEDDED.parts[-3:] == ("vpl_lightning", "assets", "tiny_clip.safetensors")
    save_file(contiguous(state), tmp_path / "tiny.safetensors", metadata())
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "tiny.safetensors")
    assert CLIPEncoder.embedded(attention_blocks=2).attention_blocks == 2

"""Reads the tensors of a CLIP checkpoint from its container, and what the container tells of them."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpl_lightning.errors import WeightsError

FORMAT = "vpl_lightning.clip/1"
"""Value of the safetensors metadata key ``format`` of the project's own files."""
MARKERS = ("input_resolution", "context_length", "vocab_size")
"""Scalars that OpenAI's archives and state dicts carry beside the weights."""
SIDECAR = "open_clip_config.json"
"""File that open_clip writes beside its weights."""
NESTED = ("state_dict", "model")
"""Keys under which training scripts wrap a state dict."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under open_clip's names, and what is known about them."""

    path: Path
    state: dict[str, Tensor]
    quick_gelu: bool | None = None
    """The activation as the file tells it; None if it does not."""
    evidence: str = ""
    """Where ``quick_gelu`` comes from."""
    vision_heads: int | None = None
    text_heads: int | None = None
    statistics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """``mean`` and ``std`` of the pixels, if the file tells them."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a TorchScript archive, a saved state dict or a safetensors file.

    Nothing is unpickled but tensors (``weights_only``), and no code of the file is run.

    The activation is known from, in this order: a TorchScript archive's own code; the marker scalars of
    OpenAI's state dicts; the metadata of a safetensors file; an ``open_clip_config.json`` beside the file;
    the order of the keys (OpenAI's blocks register ``attn`` before ``ln_1``, open_clip's the other way, and
    only OpenAI's order tells).

    Raises:
        WeightsError: If the file is missing or is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        checkpoint = _read_safetensors(path)
    elif _is_torchscript(path):
        checkpoint = _read_torchscript(path)
    else:
        checkpoint = _read_state_dict(path)
    return _with_sidecar(checkpoint)


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if (
        told.get("format", FORMAT).startswith(FORMAT.partition("/")[0])
        and told.get("format", FORMAT) != FORMAT
    ):
        raise WeightsError(
            f"{path} has format {told['format']!r}, this release reads {FORMAT!r}: update the package"
        )
    marked = all(key in state for key in MARKERS)
    state = _clean(path, state)
    quick_gelu, evidence = (True, "OpenAI's marker tensors") if marked else (None, "")
    if "quick_gelu" in told:
        quick_gelu, evidence = _flag(path, told["quick_gelu"]), "the file's metadata"
    return Checkpoint(
        path,
        _expand_tokens(path, state, told),
        quick_gelu=quick_gelu,
        evidence=evidence,
        vision_heads=_count(path, told, "vision_heads"),
        text_heads=_count(path, told, "text_heads"),
    )


def _expand_tokens(path: Path, state: dict[str, Tensor], told: Mapping[str, str]) -> dict[str, Tensor]:
    """Undo the sparse token table of the project's own files: rows that training never used are zero."""
    if "token_embedding.ids" not in state or "token_embedding.rows" not in state:
        return state
    vocabulary = _count(path, told, "vocab_size")
    ids, rows = state.pop("token_embedding.ids").long(), state.pop("token_embedding.rows")
    if (
        vocabulary is None
        or ids.shape != rows.shape[:1]
        or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary)
    ):
        raise WeightsError(
            f"{path}: the token table of {tuple(ids.shape)} ids and {tuple(rows.shape)} rows does not fit "
            f"the vocab_size {vocabulary} of the metadata"
        )
    state["token_embedding.weight"] = rows.new_zeros(vocabulary, rows.shape[1]).index_copy(0, ids, rows)
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*deprecated", category=FutureWarning)
            warnings.filterwarnings(
                "ignore", message=".*torch.jit.load.*deprecated", category=DeprecationWarning
            )
            state = dict(torch.jit.load(str(path), map_location="cpu").state_dict())  # type: ignore[no-untyped-call]
        with zipfile.ZipFile(path) as archive:
            code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    except (RuntimeError, zipfile.BadZipFile, ValueError) as error:
        raise WeightsError(f"{path} is not a readable TorchScript archive: {error}") from error
    plain = b"torch.gelu(" in code
    evidence = "the archive's code calls gelu" if plain else "a TorchScript archive as OpenAI publishes them"
    return Checkpoint(path, _clean(path, state), quick_gelu=not plain, evidence=evidence)


def _read_state_dict(path: Path) -> Checkpoint:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as a state dict: {str(error).splitlines()[0]}; "
            "save the model's state_dict() alone"
        ) from error
    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds {type(loaded).__name__}, not a state dict")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    quick_gelu, evidence = None, ""
    if all(key in state for key in MARKERS):
        quick_gelu, evidence = True, "OpenAI's marker scalars"
    elif _openai_order(list(state)):
        quick_gelu, evidence = True, "the order of the keys, which is that of OpenAI's code"
    return Checkpoint(path, _clean(path, state), quick_gelu=quick_gelu, evidence=evidence)


def _openai_order(keys: list[str]) -> bool:
    block = next(
        (key.removesuffix("attn.in_proj_weight") for key in keys if key.endswith("attn.in_proj_weight")), ""
    )
    norm = f"{block}ln_1.weight"
    return norm in keys and keys.index(f"{block}attn.in_proj_weight") < keys.index(norm)


def _clean(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    kept = {key.removeprefix("module."): value for key, value in state.items()}
    kept = {key: value for key, value in kept.items() if key not in MARKERS}
    for key, value in kept.items():
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: '{key}' is {type(value).__name__}, not a tensor; save model.state_dict() alone"
            )
    return kept


def _with_sidecar(checkpoint: Checkpoint) -> Checkpoint:
    """Add what an ``open_clip_config.json`` beside the file tells; the file's own word comes first."""
    path = checkpoint.path.with_name(SIDECAR)
    if not path.is_file():
        return checkpoint
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        model, pixels = told.get("model_cfg", told), told.get("preprocess_cfg", {})
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        known = dict(vars(checkpoint))
        width = checkpoint.state.get("visual.class_embedding")
        if known["vision_heads"] is None and "head_width" in vision and width is not None:
            known["vision_heads"] = width.shape[0] // int(vision["head_width"])
        if known["text_heads"] is None and "heads" in text:
            known["text_heads"] = int(text["heads"])
        if known["evidence"] in ("", "the order of the keys, which is that of OpenAI's code"):
            known.update(quick_gelu=bool(model.get("quick_gelu", False)), evidence=f"{SIDECAR} beside it")
        known["statistics"] = {
            key: tuple(map(float, pixels[key])) for key in ("mean", "std") if key in pixels
        }
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}; repair or remove it") from error
    return Checkpoint(**known)


def _flag(path: Path, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise WeightsError(f"{path}: metadata quick_gelu is {text!r}; it must be 'true' or 'false'")
    return text.lower() == "true"


def _count(path: Path, told: Mapping[str, str], key: str) -> int | None:
    if key not in told:
        return None
    if not re.fullmatch(r"[1-9]\d*", told[key]):
        raise WeightsError(f"{path}: metadata {key} is {told[key]!r}; it must be a positive number")
    return int(told[key])

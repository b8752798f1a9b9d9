"""Builds a CLIP from a checkpoint: geometry from the tensors, the activation known or refused."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpl_lightning.clip.checkpoints import Checkpoint, read_checkpoint
from vpl_lightning.clip.model import CLIP, TowerSize
from vpl_lightning.errors import WeightsError

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny_clip.safetensors"
"""The tiny CLIP of drawn scenes that the package carries."""
HEAD_WIDTH = 64
"""Width of an attention head in every CLIP of OpenAI's (``build_model``)."""
SHOWN = 3
"""Faults that one error message lists."""

CORE = {
    "visual.conv1.weight": "V 3 p p",
    "visual.class_embedding": "V",
    "visual.positional_embedding": "1+h*w V",
    "visual.proj": "V D",
    "visual.transformer.resblocks.0.mlp.c_fc.weight": "4V V",
    "positional_embedding": "context W",
    "token_embedding.weight": "vocabulary W",
    "transformer.resblocks.0.mlp.c_fc.weight": "4W W",
    "text_projection": "W D",
    "ln_final.weight": "W",
    "logit_scale": "",
}
"""Tensors that the geometry is read from, with their axes."""


def load_checkpoint(
    path: str | Path,
    *,
    quick_gelu: bool | None = None,
    heads: int | None = None,
    text_heads: int | None = None,
) -> CLIP:
    """Build a CLIP from a local file and load it strictly.

    Args:
        path: See :func:`read_checkpoint`.
        quick_gelu: The activation, needed only where the file does not tell.
        heads: Heads of the vision blocks; the file's word or width / 64 unless given.
        text_heads: The same of the text blocks.

    Raises:
        WeightsError: If the file is unreadable, no CLIP with a vision transformer, or silent or contradicted
            about its activation; names the tensor, the expected and the found shape.
    """
    checkpoint = read_checkpoint(path)
    activation = _activation(checkpoint, quick_gelu)
    model = _build(
        checkpoint,
        activation,
        heads=heads or checkpoint.vision_heads,
        text_heads=text_heads or checkpoint.text_heads,
    )
    _check(checkpoint, model)
    model.load_state_dict(checkpoint.state, assign=True)
    model.visual.image_mean = checkpoint.statistics.get("mean")
    model.visual.image_std = checkpoint.statistics.get("std")
    return model


def load_open_clip(name: str, pretrained: str | None) -> tuple[Any, Any]:
    """Build one of open_clip's models and its tokenizer.

    Args:
        name: A name that ``open_clip.list_models()`` lists.
        pretrained: A tag or a local file; None for random weights, with a warning.

    Raises:
        WeightsError: If the name or tag is unknown, the activations differ, or the weights cannot be had.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise WeightsError(f"open_clip has no model '{name}'; see open_clip.list_models()")
    return _open_clip_model(name, config, pretrained), open_clip.get_tokenizer(name)


def _open_clip_model(name: str, config: Mapping[str, Any], pretrained: str | None) -> Any:
    import open_clip

    quick_gelu = bool(config.get("quick_gelu", False))
    if pretrained is None:
        warnings.warn(f"open_clip model '{name}' without pretrained weights: they are random", stacklevel=4)
        return open_clip.create_model(name)
    if Path(pretrained).is_file():
        return _load_named(name, config, Path(pretrained))
    tags = open_clip.list_pretrained_tags_by_model(name)
    told = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    if not told:
        raise WeightsError(
            f"open_clip has no weights '{pretrained}' for '{name}', and no such file exists; "
            f"tags: {', '.join(tags)}"
        )
    if bool(told.get("quick_gelu", False)) != quick_gelu:
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
        raise WeightsError(
            f"the weights '{pretrained}' were trained with {_name(not quick_gelu)}, '{name}' builds "
            f"{_name(quick_gelu)}: use '{other}'"
        )
    try:
        return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:
        raise WeightsError(
            f"open_clip could not get the weights '{pretrained}' of '{name}': {error}; "
            "fetch the file yourself and load it with CLIPEncoder.from_checkpoint"
        ) from error


def fingerprint(state: Mapping[str, Tensor], settings: str) -> str:
    """Return a SHA-256 over tensors, as float32 and in the order of their names, and over settings."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _load_named(name: str, config: Mapping[str, Any], path: Path) -> Any:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "layers" not in vision or not isinstance(vision["layers"], int):
        raise WeightsError(f"'{name}' has no plain vision transformer; choose a ViT")
    model = load_checkpoint(
        path,
        quick_gelu=bool(config.get("quick_gelu", False)),
        heads=vision["width"] // vision.get("head_width", HEAD_WIDTH),
        text_heads=text.get("heads"),
    )
    built = (
        model.visual.conv1.out_channels,
        model.visual.conv1.kernel_size[0],
        len(model.visual.transformer.resblocks),
    )
    wanted = (vision["width"], vision["patch_size"], vision["layers"])
    if built != wanted:
        raise WeightsError(
            f"{path} has (width, patch size, blocks) {built}, '{name}' has {wanted}: name the right model, "
            "or load it with CLIPEncoder.from_checkpoint"
        )
    return model


def _name(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def _activation(checkpoint: Checkpoint, asked: bool | None) -> bool:
    told = checkpoint.quick_gelu
    if asked is None and told is None:
        raise WeightsError(
            f"{checkpoint.path} does not tell whether it was trained with QuickGELU (OpenAI's models, "
            "open_clip's '-quickgelu' models) or GELU, and the wrong one ruins every result in silence: "
            "pass quick_gelu=True or quick_gelu=False"
        )
    if asked is not None and told is not None and asked != told:
        raise WeightsError(
            f"{checkpoint.path} was trained with {_name(told)} ({checkpoint.evidence}), but "
            f"quick_gelu={asked} was asked for: leave quick_gelu out"
        )
    return bool(told if asked is None else asked)


def _build(checkpoint: Checkpoint, quick_gelu: bool, *, heads: int | None, text_heads: int | None) -> CLIP:
    path, state = checkpoint.path, checkpoint.state
    shapes = _core_shapes(checkpoint)
    width, _, patch, _ = shapes["visual.conv1.weight"]
    text_width = shapes["ln_final.weight"][0]
    heads = heads or max(1, width // HEAD_WIDTH)
    text_heads = text_heads or max(1, text_width // HEAD_WIDTH)
    for name, size, count in (("heads", width, heads), ("text_heads", text_width, text_heads)):
        if size % count:
            raise WeightsError(
                f"{path}: a width of {size} cannot be cut into {count} heads; give another {name}"
            )
    with torch.device("meta"):  # the file's tensors become the parameters: no second copy, no random numbers
        return CLIP(
            vision=TowerSize(
                width=width,
                heads=heads,
                layers=_blocks(state, "visual.transformer"),
                hidden=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
            ),
            text=TowerSize(
                width=text_width,
                heads=text_heads,
                layers=_blocks(state, "transformer"),
                hidden=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
            ),
            patch_size=patch,
            native_patches=shapes["visual.positional_embedding"][0] - 1,
            context_length=shapes["positional_embedding"][0],
            vocabulary=shapes["token_embedding.weight"][0],
            joint_width=shapes["text_projection"][1],
            quick_gelu=quick_gelu,
        )


def _core_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    path, state = checkpoint.path, checkpoint.state
    if "visual.layer1.0.conv1.weight" in state:
        raise WeightsError(
            f"{path} is a ResNet CLIP (visual.layer1); this method needs a vision transformer, e.g. ViT-B-16"
        )
    missing = [name for name in CORE if name not in state]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        listed = ", ".join(f"'{name}' ({CORE[name]})" for name in missing[:SHOWN])
        raise WeightsError(
            f"{path} is no CLIP with a vision transformer under OpenAI's names: it has no tensor "
            f"{listed}{more}"
        )
    shapes = {name: tuple(state[name].shape) for name in CORE}
    for name, axes in CORE.items():
        if len(shapes[name]) != len(axes.split()):
            raise WeightsError(f"{path}: '{name}' has shape {shapes[name]}, expected axes ({axes})")
    _, channels, height, width = shapes["visual.conv1.weight"]
    if channels != 3 or height != width:
        raise WeightsError(
            f"{path}: 'visual.conv1.weight' has shape {shapes['visual.conv1.weight']}, expected "
            "(V, 3, p, p) for square patches of RGB pixels"
        )
    patches = shapes["visual.positional_embedding"][0] - 1
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise WeightsError(
            f"{path}: 'visual.positional_embedding' has shape {shapes['visual.positional_embedding']}, "
            f"expected (1 + a square number, V): {patches} patches form no square grid"
        )
    return shapes


def _blocks(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}.resblocks."
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def _check(checkpoint: Checkpoint, model: nn.Module) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.state.items()}
    faults = [
        f"'{name}' is missing, expected {shape}" for name, shape in expected.items() if name not in found
    ]
    faults += [
        f"'{name}' has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults += [f"'{name}' {found[name]} is unknown" for name in found if name not in expected]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise WeightsError(
            f"{checkpoint.path} does not fit the CLIP that its own sizes describe: "
            f"{'; '.join(faults[:SHOWN])}{more}"
        )

"""VPL inside somebody else's CLIP-ES code base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.artifacts.atomic import atomic_write
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional import vit
from vpl_lightning.functional.columns import Columns
from vpl_lightning.functional.linear import linear
from vpl_lightning.functional.recipe import PrototypeRecipe, Solution, solve
from vpl_lightning.functional.solvers import PrototypeSolver
from vpl_lightning.functional.targets import Selected, inverse_class_frequency, select_pixels
from vpl_lightning.store.memory import MemorySamples
from vpl_lightning.store.pool import SamplePool
from vpl_lightning.store.samples import SampleSource, objective_from

MAX_PIXELS = 2**19
"""Pixels kept by default: about 0.8 GB for ViT-B/16 and 45 prototypes."""
FORMAT = "vpl_lightning.plugin/1"
"""Identifies a file of :meth:`VPLPlugin.save`."""
_ENTRY = "plugin"

Array = Num[np.ndarray, "..."] | Num[Tensor, "..."]
Arrays = Array | Sequence[Any]


class VPLPlugin:
    """Learns vision prototypes from what a host's own loop sees, with the arithmetic of phase 1.

    The host keeps its code. It shows the plugin every image once, and then uses what :meth:`fit` returns in
    place of its text features. The model is only read: the weights of its last block, ``ln_post`` and
    ``proj``. Its blocks are never called, so it does not matter what they return.

    The result does not depend on the order of the images. Memory is bounded by ``max_pixels``: beyond it, a
    seeded random choice of the pixels is kept.

    Learnt prototypes want a softer softmax than text: where the host multiplies cosines by CLIP's 100 for its
    maps, :attr:`scale` is the better factor.

    Args:
        model: OpenAI-style CLIP object of the host, its fork in CLIP-ES included.
        fg_text_features: Text features of the classes.
        bg_text_features: Text features of the background words.
        recipe: Settings of phase 1, or the name of a preset.
        max_pixels: Pixels kept.
        folder: Keep them in scratch files there instead of in memory.
        heads: Attention heads of the last block, if the model does not tell.

    Raises:
        ConfigurationError: If the model has no such parts, or the text features do not fit it.
    """

    def __init__(
        self,
        model: Any,
        fg_text_features: Float[Tensor, "N D"],
        bg_text_features: Float[Tensor, "M D"],
        *,
        recipe: Literal["default", "paper"] | PrototypeRecipe = "default",
        max_pixels: int = MAX_PIXELS,
        folder: str | Path | None = None,
        heads: int | None = None,
    ) -> None:
        self.recipe = PrototypeRecipe.preset(recipe) if isinstance(recipe, str) else recipe
        self._block, self._head = _read_weights(model, heads)
        width = self._head.projection.shape[1]
        for name, given in (("fg_text_features", fg_text_features), ("bg_text_features", bg_text_features)):
            if given.ndim != 2 or given.shape[1] != width:
                raise ConfigurationError(
                    f"{name} has shape {tuple(given.shape)}; expected one row of {width} numbers a text, "
                    "as the model's encode_text returns them"
                )
        self._given = (fg_text_features.detach(), bg_text_features.detach())
        self._text = F.normalize(torch.cat([part.float().cpu() for part in self._given]), dim=-1)
        self.columns = Columns(len(fg_text_features), len(bg_text_features), self.recipe.targets.background)
        self._pool = SamplePool(max_pixels, rows=self.columns.rows, width=width, folder=folder)
        self._tag_counts = torch.zeros(self.columns.num_foreground, dtype=torch.int64)
        self.images = 0
        """Images observed."""
        self.solution: Solution | None = None
        """What the last :meth:`fit` found."""

    @property
    def scale(self) -> float:
        """Factor of the cosines that suits maps made with the learnt prototypes."""
        return self.recipe.scale()

    @torch.no_grad()
    def observe(self, image_features: Array, cams: Arrays, label_ids: Arrays, *, image_id: str = "") -> None:
        """Take note of one image.

        Args:
            image_features: Tokens that enter the last block, class token first: ``(L, 1, V)`` as CLIP-ES's
                ``encode_image`` returns them, ``(1, L, V)`` or ``(L, V)``; any float type.
            cams: One map in [0, 1] for each label, ``(K, h, w)`` on the patch grid, or a list of ``(h, w)``.
            label_ids: 0-based ids of the image's classes, in the order of the maps.
            image_id: Name of the image, for the random choice; its own features unless given.

        Raises:
            DataError: If shapes or labels do not fit together, or a value is not finite.
        """
        tokens = self._tokens(image_features)
        maps = _as_tensor(cams).float().to(tokens.device)
        classes = _as_tensor(label_ids).flatten().long().cpu()
        count = self.columns.num_foreground
        ids = classes.tolist()
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(count)):
            raise DataError(f"labels {ids} must be different ids from 0 to {count - 1}, at least one")
        if maps.ndim != 3 or not bool(maps.isfinite().all()) or not bool(tokens.isfinite().all()):
            raise DataError(f"maps of shape {tuple(maps.shape)} and tokens must be finite, maps (K, h, w)")
        features = self._dense(tokens)
        key = image_id or hashlib.blake2b(features.half().cpu().numpy().tobytes(), digest_size=16).hexdigest()
        targets = self.recipe.targets
        selected = select_pixels(
            maps,
            features,
            self._text.to(features.device),
            classes.to(features.device),
            num_foreground=count,
            config=replace(targets, balance="none") if targets.balance == "class" else targets,
            key=key,
            seed=self.recipe.seed,
        )
        self._pool.add(key, selected)
        self._tag_counts[classes] += 1
        self.images += 1

    def fit(
        self,
        *,
        device: torch.device | str | None = None,
        after_step: Callable[[PrototypeSolver], None] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M D"]]:
        """Learn the prototypes from the images observed so far.

        Args:
            device: Where to compute; that of the text features unless given.
            after_step: Called with the solver after each step, for progress.

        Returns:
            Unit-norm foreground and background prototypes in the shape, type and device of the text features.

        Raises:
            DataError: If no image left a pixel.
        """
        device = torch.device(device or self._given[0].device)
        with torch.inference_mode(False):
            self._pool.class_weights = self._class_weights()
            source: SampleSource = self._pool
            if device.type != "cpu":
                source = MemorySamples.copy(self._pool, width=self._pool.width, device=device)
            objective = objective_from(source, self.columns, self._text, self.recipe)
            start = self.recipe.start(objective).to(device)
            self.solution = solve(objective, self.recipe, start=start, after_step=after_step)
            prototypes = self.columns.expand(self.solution.rows.cpu(), self._text)
        count = self.columns.num_foreground
        return prototypes[:count].to(self._given[0]), prototypes[count:].to(self._given[1])

    def save(self, path: str | Path) -> None:
        """Write what was observed to a file of plain numbers (safetensors), whole or not at all."""
        from safetensors.torch import save

        self._pool.class_weights = None
        images = list(self._pool.images())
        parts = [selected for _, selected, _ in images]
        tensors = {"tag_counts": self._tag_counts}
        if parts:
            tensors |= {
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("features", "targets", "weights", "priorities")
            }
            tensors["positions"] = torch.cat([positions for _, _, positions in images])
            tensors["allowed"] = torch.stack([part.allowed for part in parts])
        about = {
            **self._settings(),
            "images": self.images,
            "keys": [key for key, _, _ in images],
            "sizes": [len(part.features) for part in parts],
        }
        atomic_write(path, save(tensors, metadata={_ENTRY: json.dumps(about)}))

    def load(self, path: str | Path) -> None:
        """Add what another plugin of the same settings saved; running no code from the file.

        Raises:
            DataError: If the file is missing, damaged or something else.
            ConfigurationError: If it was made with other settings or another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads(file.metadata()[_ENTRY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a file that VPLPlugin.save wrote ({error})") from error
        settings = self._settings()
        other = [key for key, value in settings.items() if about.get(key) != value]
        if other:
            raise ConfigurationError(
                f"{path} was saved with another {', '.join(other)}: build the plugin with the same model, "
                "text features and recipe"
            )
        start = 0
        for index, (key, size) in enumerate(zip(about["keys"], about["sizes"], strict=True)):
            rows = slice(start, start + size)
            start += size
            names = ("features", "targets", "weights", "priorities")
            part = {name: tensors[name][rows] for name in names}
            selected = Selected(allowed=tensors["allowed"][index], **part)
            self._pool.add(key, selected, positions=tensors["positions"][rows])
        self._tag_counts += tensors["tag_counts"]
        self.images += int(about["images"])

    def _settings(self) -> dict[str, Any]:
        """What samples depend on; plugins that agree in it can load one another's files."""
        weights = [self._head.projection, self._block.in_weight, self._block.out_weight]
        digest = hashlib.sha256()
        for tensor in (*weights, self._text):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        kept = ("features", "targets", "seed")
        recipe = {key: value for key, value in asdict(self.recipe).items() if key in kept}
        return {"format": FORMAT, "model and text": digest.hexdigest(), "recipe": recipe}

    def _class_weights(self) -> Tensor | None:
        if self.recipe.targets.balance != "class":
            return None
        return inverse_class_frequency(self._tag_counts, num_images=self.images, columns=self.columns)

    def _tokens(self, image_features: Array) -> Float[Tensor, "1 T V"]:
        tokens = _as_tensor(image_features)
        if tokens.ndim == 3 and 1 in tokens.shape[:2]:
            tokens = tokens.flatten(0, 1)
        width = self._head.projection.shape[0]
        if tokens.ndim != 2 or tokens.shape[1] != width:
            raise DataError(
                f"image_features has shape {tuple(tokens.shape)}; expected an image's tokens before "
                f"the last block, (L, 1, {width}), (1, L, {width}) or (L, {width})"
            )
        return tokens[None].to(self._head.projection)

    def _dense(self, tokens: Float[Tensor, "1 T V"]) -> Float[Tensor, "P D"]:
        """Return dense features exactly as :meth:`CLIPEncoder.dense` does."""
        block, kind = self._block, self.recipe.features
        if kind == "value":
            normed = vit.layer_norm(tokens, block.norm_1)
            value = linear(normed, block.in_weight, block.in_bias).chunk(3, dim=-1)[2]
            tokens = linear(value, block.out_weight, block.out_bias)
        elif kind == "final":
            tokens = vit.trace_block(tokens, block).outputs
        return vit.dense_features(tokens, self._head)[0]


def _read_weights(model: Any, heads: int | None) -> tuple[vit.BlockWeights, vit.HeadWeights]:
    """Copy the last block and the head of a host's vision tower in float32."""
    try:
        visual = model.visual
        block = vit.block_weights(visual.transformer.resblocks[-1], heads=heads)
        norm, projection = vit.norm_weights(visual.ln_post), visual.proj.detach().float().clone()
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} is no OpenAI-style CLIP with a vision transformer: {error}"
        ) from error
    block = vit.cast_block(block, torch.float32)
    values = {name: _detach(value) for name, value in block._asdict().items()}
    return vit.BlockWeights(**values), vit.HeadWeights(_detach(norm), projection)


def _as_tensor(value: Arrays) -> Tensor:
    """Return numbers of any container as a tensor without gradient."""
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        value = [_as_tensor(item) if isinstance(item, (np.ndarray, Tensor)) else item for item in value]
        return torch.stack(value) if value and isinstance(value[0], Tensor) else torch.tensor(value)
    return torch.tensor(value)


def _detach(value: Any) -> Any:
    if isinstance(value, vit.NormWeights):
        return vit.NormWeights(
            value.weight.detach().float().clone(), value.bias.detach().float().clone(), value.eps
        )
    return value.detach().clone() if isinstance(value, Tensor) else value

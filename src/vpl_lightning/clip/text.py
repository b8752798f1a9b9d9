"""The text side of a CLIP: prompts to unit rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.clip.class_sets import SLOT, ClassSet
from vpl_lightning.errors import ConfigurationError

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to ``(texts, context length)`` token ids."""

TEXTS_AT_ONCE = 8
"""Texts in one pass of the text tower: bounds the memory of 80 templates times 100 classes."""


def default_tokenizer(model: Any) -> Tokenizer:
    """Return open_clip's byte-pair tokenizer, which is OpenAI's, at the context length of a model.

    Its module is read by itself: the package would bring torchvision and timm, a quarter of a gigabyte.
    """
    length = getattr(model, "context_length", None)
    tokenizer: Tokenizer = _tokenizer_module().SimpleTokenizer(
        context_length=int(model.positional_embedding.shape[0] if length is None else length)
    )
    return tokenizer


@cache
def _tokenizer_module() -> Any:
    package = cast(ModuleSpec, find_spec("open_clip"))
    folder = Path(next(iter(package.submodule_search_locations or ())))
    loader = SourceFileLoader("_open_clip_tokenizer", str(folder / "tokenizer.py"))
    module = module_from_spec(cast(ModuleSpec, spec_from_loader(loader.name, loader)))
    loader.exec_module(module)
    return module


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Int[Tensor, "texts context"]:
    """Tokenize texts, refusing those that the tokenizer would cut off in silence.

    Raises:
        ConfigurationError: Names the text that does not fit.
    """
    encode, limit = getattr(tokenizer, "encode", None), getattr(tokenizer, "context_length", None)
    if encode is not None and limit is not None:
        for text in texts:
            needed = len(encode(text)) + 2
            if needed > limit:
                raise ConfigurationError(
                    f"the prompt {text!r} needs {needed} tokens, this CLIP reads {limit}: "
                    "shorten the prompt or template"
                )
    return tokenizer(list(texts))


def warn_of_unknown_tokens(texts: Sequence[str], tokens: Int[Tensor, "texts context"], table: Tensor) -> None:
    """Warn of texts with a token whose embedding is zero: a CLIP trained on few words never saw it."""
    empty = (table == 0).all(-1)
    if not bool(empty.any()):
        return
    ends = tokens.argmax(-1, keepdim=True)
    inside = torch.arange(tokens.shape[1], device=tokens.device) <= ends
    unknown = (empty[tokens] & inside).any(-1).tolist()
    affected = [text for text, bad in zip(texts, unknown, strict=True) if bad]
    if affected:
        warnings.warn(
            f"{len(affected)} of {len(texts)} prompts hold words that this CLIP was never trained on, "
            f"such as {affected[0]!r}: their embeddings mean little",
            stacklevel=3,
        )


def embed_texts(
    model: Any, texts: str | Sequence[str], tokenizer: Tokenizer, device: torch.device
) -> Float[Tensor, "texts D"]:
    """Run the model's own text tower.

    Returns:
        Unit rows, float32.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = tokenize(texts, tokenizer).to(device)
    tower = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    table = getattr(getattr(tower, "token_embedding", None), "weight", None)
    if table is not None:
        warn_of_unknown_tokens(texts, tokens, table)
    parts = (tokens[start : start + TEXTS_AT_ONCE] for start in range(0, len(tokens), TEXTS_AT_ONCE))
    rows = [model.encode_text(part).float() for part in parts]
    return F.normalize(torch.cat(rows), dim=-1)


def drop_tower(model: Any) -> None:
    """Free all that a CLIP object has beside its vision tower and its logits' scale and bias."""
    for name in [name for name, _ in model.named_children() if name != "visual"]:
        delattr(model, name)
    for name in [name for name, _ in model.named_parameters(recurse=False) if not name.startswith("logit")]:
        setattr(model, name, None)


def refuse(texts: list[str]) -> Tensor:
    """Stand in for the tokenizer of a tower that was dropped."""
    raise ConfigurationError(
        f"{texts[0]!r} cannot be encoded: the text tower was dropped to save memory; encode texts before that"
    )


def fill_templates(classes: ClassSet) -> list[str]:
    """Return every prompt in every template: classes first, then background words; templates vary fastest."""
    return [
        template.replace(SLOT, text)
        for text in (*classes.prompts, *classes.background)
        for template in classes.templates
    ]


def average_templates(rows: Float[Tensor, "texts D"], templates: int) -> Float[Tensor, "C D"]:
    """Average the unit rows of the same prompt and normalise again, as OpenAI's zero-shot classifiers do."""
    return F.normalize(rows.reshape(-1, templates, rows.shape[-1]).mean(1), dim=-1)

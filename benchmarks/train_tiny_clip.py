"""Train a tiny CLIP on the captions of drawn scenes, and on nothing else.

    python benchmarks/train_tiny_clip.py --seed 0 --output tiny_clip_seed0.safetensors

Minutes on one thread. The model is open_clip's, pooled at the class token and with QuickGELU as OpenAI's; loss and
tokenizer are open_clip's too. No mask is read. Images that show the same classes have captions that fit them all:
every caption that is true of an image counts as a right answer (:class:`SharedCaptionLoss`), none becomes a false
negative.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save as serialise
from tiny_clip_scores import MEAN, STD, score
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vpl_lightning.data.scenes import BACKGROUNDS, CLASSES, Scene, describe, render_scene
from vpl_lightning.data.scenes.captions import NAME_TEMPLATES, PLACES, SENTENCES, with_article

IMAGE_SIZE, PATCH_SIZE, CONTEXT_LENGTH, VOCABULARY = 112, 8, 20, 49408
HEAD_WIDTH, TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 32, 128, 4, 2
TRAINING_SERIES = 1_000
"""Series of scenes of seed 0; far below the series that the data module draws from."""
SCALE_RANGE = (20.0, 100.0)
"""Logit scale at the first and the last step, rising geometrically."""
PLACE_SHARE = 0.5
"""Share of captions that name the background too."""
SHIFT = 8
"""Largest shift of a training image, in pixels."""
REPORT_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of one training; the defaults made the models whose scores the project reports."""

    seed: int = 0
    steps: int = 700
    scenes: int = 5000
    home_share: float = 0.3
    single_share: float = 0.8
    batch: int = 96
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 40
    width: int = 128
    layers: int = 3
    joint: int = 64
    patch_dropout: float = 0.6
    late_share: float = 0.85
    precision: str = "bf16"


class Vocabulary:
    """The tokens that captions use, numbered in order of their ids: the end of text stays the largest."""

    def __init__(self) -> None:
        names = [*CLASSES, *BACKGROUNDS]
        texts = [template.format(name) for template in NAME_TEMPLATES for name in names]
        texts += [sentence.format(with_article(name)) for sentence in SENTENCES for name in names]
        texts += [phrase for phrases in PLACES.values() for phrase in phrases]
        self.tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
        self.ids = torch.unique(self.tokenizer([*texts, ", and"]))
        self.rows = torch.full((VOCABULARY,), -1).index_copy(0, self.ids, torch.arange(len(self.ids)))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the rows of the tokens of texts."""
        rows: Tensor = self.rows[self.tokenizer(list(texts))]
        if int(rows.min()) < 0:
            raise ValueError("a text has a word that no caption has")
        return rows


class SharedCaptionLoss(ClipLoss):
    """open_clip's loss with several right answers; equal to it if each caption fits one image only."""

    def forward(self, images: Tensor, texts: Tensor, scale: float, true: Tensor) -> Tensor:
        """Return the mean cross-entropy of both directions; ``true`` marks the right pairs (image, caption)."""
        by_image, by_text = self.get_logits(images, texts, scale)
        return (
            F.cross_entropy(by_image, true / true.sum(1, keepdim=True))
            + F.cross_entropy(by_text, (true / true.sum(0)).T)
        ) / 2


def build(training: Training, vocabulary: int) -> CLIP:
    """Return the untrained model."""
    vision = CLIPVisionCfg(
        layers=training.layers,
        width=training.width,
        head_width=HEAD_WIDTH,
        patch_size=PATCH_SIZE,
        image_size=IMAGE_SIZE,
        patch_dropout=training.patch_dropout,
    )
    text = CLIPTextCfg(
        CONTEXT_LENGTH, vocab_size=vocabulary, width=TEXT_WIDTH, heads=TEXT_HEADS, layers=TEXT_LAYERS
    )
    model = CLIP(training.joint, vision, text, quick_gelu=True)
    model.logit_scale.requires_grad_(False)
    return model


def batch(
    rng: np.random.Generator, scenes: Sequence[Scene], pixels: Tensor, shares: np.ndarray, size: int
) -> tuple[Tensor, list[str], Tensor]:
    """Return augmented images, their captions, and which captions are true of which images."""
    chosen = rng.choice(len(scenes), size, p=shares)
    images = pixels[chosen].float()
    flipped = torch.from_numpy(rng.random(size) < 0.5)
    images[flipped] = images[flipped].flip(-1)
    top, left = rng.integers(0, 2 * SHIFT + 1, 2)
    images = F.pad(images, (SHIFT,) * 4, mode="reflect")
    images = images[..., top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (size, 3, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-0.1, 0.1, (size, 1, 1, 1))).float()
    images = images * (gain / 255 / STD) + (offset - MEAN) / STD
    picked = [scenes[i] for i in chosen]
    places = [scene.background if rng.random() < PLACE_SHARE else None for scene in picked]
    said = list(zip(picked, places, strict=True))
    captions = [describe(rng, [CLASSES[i] for i in scene.labels], place) for scene, place in said]
    true = [
        [float(other.labels == scene.labels and place in (None, scene.background)) for other, place in said]
        for scene in picked
    ]
    return images, captions, torch.tensor(true)


def optimizer_of(model: CLIP, training: Training) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in trained if p.ndim <= 1 or "embedding" in name]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def train(training: Training) -> tuple[CLIP, Vocabulary]:
    """Draw the scenes and train the model."""
    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    series = TRAINING_SERIES + training.seed
    scenes = [
        render_scene(series, index, size=IMAGE_SIZE, home_share=training.home_share)
        for index in range(training.scenes)
    ]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    single = np.array([len(scene.labels) == 1 for scene in scenes])
    shares = np.where(
        single, training.single_share / single.sum(), (1 - training.single_share) / (~single).sum()
    )
    vocabulary, loss_function = Vocabulary(), SharedCaptionLoss()
    model = build(training, len(vocabulary.ids)).train()
    optimizer = optimizer_of(model, training)
    started = time.perf_counter()
    for step in range(training.steps):
        done = step / training.steps
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / training.warmup) * cosine
        scale = SCALE_RANGE[0] * (SCALE_RANGE[1] / SCALE_RANGE[0]) ** done
        images, captions, true = batch(rng, scenes, pixels, shares, training.batch)
        with late_reading(model, bool(rng.random() < training.late_share)):
            image_features, text_features = encode(model, images, vocabulary(captions), training.precision)
        loss = loss_function(image_features, text_features, scale, true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0:
            pace = (time.perf_counter() - started) / (step + 1)
            print(
                f"step {step + 1}/{training.steps}  loss {loss.item():.3f}  {pace:.2f} s a step", flush=True
            )
    model.logit_scale.data.fill_(math.log(SCALE_RANGE[1]))
    return model.eval(), vocabulary


def read_late(block: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Keep the class token from reading patches in a block (a forward pre-hook)."""
    length = inputs[0].shape[1]
    mask = inputs[0].new_zeros(length, length)
    mask[0, 1:] = -torch.inf
    return inputs, {**options, "attn_mask": mask}


@contextmanager
def late_reading(model: CLIP, active: bool) -> Iterator[None]:
    """Let the class token read patches in the last block only, if ``active``.

    Used in a share of the training steps, as a dropout of structure: a small model would otherwise gather all it needs
    before the last block, and maps of the last block would show little of what the model sees.
    """
    blocks = model.visual.transformer.resblocks[:-1] if active else []
    handles = [block.register_forward_pre_hook(read_late, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode(model: CLIP, images: Tensor, tokens: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return unit features of images and captions in float32.

    The towers run in ``precision`` on master weights in float32. Attention runs unfused: for this few tokens the
    fused backward pass is the slower one on a CPU.
    """
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    state = {name: value.to(kind) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    with sdpa_kernel(SDPBackend.MATH):
        image_features, text_features, _ = torch.func.functional_call(model, state, (images.to(kind), tokens))
    return F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)


def save(
    path: Path, model: CLIP, vocabulary: Vocabulary, training: Training, scores: dict[str, float]
) -> None:
    """Write half-precision weights, the token table as its used rows, and how the model came about."""
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    state["token_embedding.rows"] = state.pop("token_embedding.weight")
    state["token_embedding.ids"] = vocabulary.ids.int()
    options = {key: value for key, value in asdict(training).items() if value != getattr(Training(), key)}
    options = {"seed": training.seed, "steps": training.steps, **options}
    told = {
        "format": "vpl_lightning.clip/1",
        "quick_gelu": "true",
        "vision_heads": str(training.width // HEAD_WIDTH),
        "text_heads": str(TEXT_HEADS),
        "image_size": str(IMAGE_SIZE),
        "patch_size": str(PATCH_SIZE),
        "context_length": str(CONTEXT_LENGTH),
        "vocab_size": str(VOCABULARY),
        "command": " ".join(
            [
                "python benchmarks/train_tiny_clip.py",
                *(f"--{key.replace('_', '-')} {value}" for key, value in options.items()),
            ]
        ),
        "seed": str(training.seed),
        "steps": str(training.steps),
        "scores": json.dumps(scores),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(serialise(state, metadata=told))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def main(args: Sequence[str] | None = None) -> int:
    """Train, score on the development series, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, value in asdict(Training()).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dev-scenes", type=int, default=200)
    options = vars(parser.parse_args(args))
    output, threads, dev_scenes = options.pop("output"), options.pop("threads"), options.pop("dev_scenes")
    torch.set_num_threads(threads)
    training = Training(**options)
    model, vocabulary = train(training)
    scores = score(model, vocabulary, scenes=dev_scenes)
    save(output, model, vocabulary, training, scores)
    print(json.dumps(scores), f"{output.stat().st_size / 1e6:.2f} MB", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

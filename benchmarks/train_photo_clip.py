"""Train small CLIPs for photographs on the image-level labels of a data set in VOC layout, and on nothing else.

    python benchmarks/train_photo_clip.py --root VOC2012 --seeds 0 1 2 --out models

Minutes a seed on one thread. No mask and no box is read. Captions are templates filled with an image's tags. The
tags name no background, so CLIP-ES's background words would stay without a meaning; one generic word gets one: some
views of an image show nothing but patches along its border, in shuffled places, and are captioned "background".
As many other views have their patches shuffled too, or the shuffling alone would tell.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from photo_clip import (
    PATCH_SIZE,
    STEM_MEAN,
    STEM_STD,
    PhotoCLIPConfig,
    build_photo_clip,
    load_photo_clip,
    save_photo_clip,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.clip import ClassSet, CLIPEncoder, class_set

CLASSES = Path(__file__).with_name("photo_classes.yaml")
TEMPLATES = (
    "a clean origami {}.",
    "a photo of a {}.",
    "itap of a {}.",
    "art of the {}.",
    "a photo of the {}.",
    "{}.",
)
BORDER = 2
"""Patches along each side of an image that a background view may show."""
SCALE_RANGE = (20.0, 100.0)
"""CLIP's logit scale at the first and the last step."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of one training.

    Attributes:
        steps: Optimiser steps.
        batch: Views a step.
        kept: Share of an image's patches that a view shows.
        rate: AdamW's peak learning rate; one tenth of the steps warm up, then cosine.
        decay: Weight decay of the matrices.
        background: Share of views that show only the border.
        single: Share of captions that name one tag alone.
    """

    steps: int = 160
    batch: int = 96
    kept: float = 0.3
    rate: float = 1e-3
    decay: float = 0.2
    background: float = 0.1
    single: float = 0.5


class TaggedPhotos:
    """Stem features and tags of the images of one list, features flipped and not, half precision, in RAM."""

    def __init__(self, root: Path, split: str, classes: ClassSet) -> None:
        listed = (
            Path(split) if Path(split).is_file() else root / "ImageSets" / "Segmentation" / f"{split}.txt"
        )
        self.root = root
        self.ids = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        self.tags = [_tags(root / "Annotations" / f"{name}.xml", classes) for name in self.ids]
        self.features = torch.empty(0)

    def pixels(self, index: int, side: int) -> np.ndarray[Any, Any]:
        image = Image.open(self.root / "JPEGImages" / f"{self.ids[index]}.jpg").convert("RGB")
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    def cache(self, model: Any, grid: int) -> None:
        """Run the stem once over every image and its mirror image."""
        found = []
        with torch.no_grad():
            for index in range(len(self.ids)):
                pixels = (
                    torch.from_numpy(self.pixels(index, grid * PATCH_SIZE).copy()).permute(2, 0, 1).float()
                    / 255
                )
                pixels = (pixels - torch.tensor(STEM_MEAN)[:, None, None]) / torch.tensor(STEM_STD)[
                    :, None, None
                ]
                both = model.visual.conv1.features(torch.stack([pixels, pixels.flip(-1)]))
                found.append(both.flatten(2).transpose(1, 2).half())
        self.features = torch.stack(found)


def train(
    photos: TaggedPhotos, config: PhotoCLIPConfig, settings: Training, classes: ClassSet, seed: int
) -> tuple[Any, Tensor]:
    """Train one model; return it and the ids of the tokens it was trained on."""
    from open_clip.tokenizer import SimpleTokenizer

    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = build_photo_clip(config)
    sample = photos.features[:, 0].float().flatten(0, 1)
    model.visual.conv1.mean.copy_(sample.mean(0))
    model.visual.conv1.std.copy_(sample.std(0).clamp_min(1e-3))
    del sample
    tokenizer = SimpleTokenizer(context_length=config.context_length)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != "logit_scale"]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in trained if p.ndim > 1 and "embedding" not in name],
                "weight_decay": settings.decay,
            },
            {"params": [p for name, p in trained if p.ndim < 2 or "embedding" in name], "weight_decay": 0.0},
        ],
        lr=settings.rate,
        betas=(0.9, 0.98),
    )
    order = _balanced_order(photos.tags, settings.steps * settings.batch, draw)
    seen: set[int] = set()
    begun = time.monotonic()
    for step in range(settings.steps):
        share = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, 10 * share + 0.02) * 0.5 * (1 + math.cos(math.pi * share))
        scale = SCALE_RANGE[0] * (SCALE_RANGE[1] / SCALE_RANGE[0]) ** share
        members = order[step * settings.batch : (step + 1) * settings.batch]
        views = [_view(photos, index, config.grid, settings, draw) for index in members]
        shown, captions = [view[2] for view in views], []
        for tags in shown:
            captions.append(_caption(tags, classes, settings, draw))
        texts = sorted({text for text, _ in captions})
        named = {text: tags for text, tags in captions}
        tokens = tokenizer(texts)
        seen.update(tokens.unique().tolist())
        images = _encode_views(model, torch.stack([v[0] for v in views]), torch.stack([v[1] for v in views]))
        rows = F.normalize(model.encode_text(tokens), dim=-1)
        fits = torch.tensor([[named[text] <= tags for text in texts] for tags in shown]).float()
        loss = contrastive_loss(scale * images @ rows.T, fits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == settings.steps:
            print(
                f"seed {seed} step {step} loss {loss.item():.3f} {time.monotonic() - begun:.0f} s", flush=True
            )
    with torch.no_grad():
        model.logit_scale.fill_(math.log(SCALE_RANGE[1]))
    return model.eval(), torch.tensor(sorted(seen))


def contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """InfoNCE in both directions where an image fits several captions and a caption several images, all equally."""
    by_image = -(F.log_softmax(logits, 1) * fits).sum(1) / fits.sum(1)
    by_text = -(F.log_softmax(logits, 0) * fits).sum(0) / fits.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def score(encoder: CLIPEncoder, photos: TaggedPhotos, grid: int, classes: ClassSet) -> dict[str, float]:
    """Return zero-shot scores in per cent: top-1 (a present class ranks first) and mean average precision."""
    N = len(classes.foreground)
    pixels = np.stack([photos.pixels(index, grid * PATCH_SIZE) for index in range(len(photos.ids))])
    images = torch.cat(
        [encoder.encode_image(part) for part in np.array_split(pixels, max(1, len(pixels) // 16))]
    )
    cosines = (F.normalize(images, dim=-1) @ encoder.encode_classes(classes)[:N].T).numpy()
    truth = np.zeros_like(cosines, bool)
    for index, tags in enumerate(photos.tags):
        truth[index, sorted(tags)] = True
    top = truth[np.arange(len(truth)), cosines.argmax(1)].mean()
    precisions = []
    for c in range(N):
        ranked = truth[np.argsort(-cosines[:, c], kind="stable"), c]
        if ranked.any():
            precisions.append((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean())
    return {"top1": 100 * float(top), "map": 100 * float(np.mean(precisions))}


def _tags(path: Path, classes: ClassSet) -> frozenset[int]:
    names = {node.findtext("name") for node in ElementTree.parse(path).getroot().iter("object")}  # noqa: S314
    return frozenset(classes.foreground.index(name) for name in names if name in classes.foreground)


def _balanced_order(tags: Sequence[frozenset[int]], length: int, draw: random.Random) -> list[int]:
    """Draw images with a weight of the inverse root of how frequent their rarest tag is."""
    counts = {c: sum(c in one for one in tags) for one in tags for c in one}
    weights = [max(counts[c] ** -0.5 for c in one) if one else 0.0 for one in tags]
    return draw.choices(range(len(tags)), weights, k=length)


def _view(
    photos: TaggedPhotos, index: int, grid: int, settings: Training, draw: random.Random
) -> tuple[Tensor, Tensor, frozenset[int]]:
    """Return the features of some patches of an image, their places, and its tags (-1 alone for background)."""
    features = photos.features[index, draw.randrange(2)]
    count = round(grid * grid * settings.kept)
    kind = draw.random()
    if kind < settings.background:
        rows, columns = np.divmod(np.arange(grid * grid), grid)
        inner = (np.minimum(rows, columns) >= BORDER) & (np.maximum(rows, columns) < grid - BORDER)
        chosen = draw.choices(np.flatnonzero(~inner).tolist(), k=count)
        places = draw.sample(range(grid * grid), count)
        return features[chosen], torch.tensor(places), frozenset([-1])
    chosen = draw.sample(range(grid * grid), count)
    places = draw.sample(range(grid * grid), count) if kind < 2 * settings.background else chosen
    return features[chosen], torch.tensor(places), photos.tags[index]


def _caption(
    tags: frozenset[int], classes: ClassSet, settings: Training, draw: random.Random
) -> tuple[str, frozenset[int]]:
    """Return a caption and the tags that it names."""
    named = sorted(tags)
    draw.shuffle(named)
    if draw.random() < settings.single:
        named = named[:1]
    words = [
        classes.background[0] if tag < 0 else draw.choice((classes.foreground[tag], classes.prompts[tag]))
        for tag in named
    ]
    text = draw.choice((" and ", " and a ", ", ")).join(words)
    return draw.choice(TEMPLATES).format(text), frozenset(named)


def _encode_views(model: Any, features: Tensor, places: Tensor) -> Tensor:
    visual = model.visual
    patches = visual.conv1.project(features.float()) + visual.positional_embedding[1:][places]
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(patches), 1, -1)
    tokens = visual.transformer(visual.ln_pre(torch.cat([first, patches], 1)))
    return F.normalize(visual.ln_post(tokens[:, 0]) @ visual.proj, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, required=True, help="folder with JPEGImages, Annotations and ImageSets"
    )
    parser.add_argument(
        "--split", default="train_aug", help="list to train on: a name in ImageSets, or a file"
    )
    parser.add_argument("--score", default="val", help="list to score on, which chooses nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--out", type=Path, required=True, help="folder of photo_clip_seed<seed>.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    classes, config, settings = class_set(str(CLASSES)), PhotoCLIPConfig(), Training(steps=args.steps)
    photos, held = (TaggedPhotos(args.root, split, classes) for split in (args.split, args.score))
    begun = time.monotonic()
    photos.cache(build_photo_clip(config), config.grid)
    print(
        f"stem features of {len(photos.ids)} images and their mirror images: {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        begun = time.monotonic()
        model, tokens = train(photos, config, settings, classes, seed)
        notes = {
            "command": " ".join(["python", *sys.argv]),
            "seed": str(seed),
            "seconds": f"{time.monotonic() - begun:.0f}",
            "training": json.dumps(settings.__dict__),
        }
        path = args.out / f"photo_clip_seed{seed}.safetensors"
        save_photo_clip(model, config, path, tokens=tokens, notes=notes)
        scores = score(load_photo_clip(str(path)), held, config.grid, classes)
        notes["scores"] = json.dumps({"split": args.score, **scores})
        save_photo_clip(model, config, path, tokens=tokens, notes=notes)
        print(f"{path.name}: {args.score} top-1 {scores['top1']:.1f}, mAP {scores['map']:.1f}", flush=True)


if __name__ == "__main__":
    main()

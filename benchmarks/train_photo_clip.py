"""Train small CLIPs for photographs on the image-level labels of a data set in VOC layout, nothing else.

    python benchmarks/train_photo_clip.py --root VOC2012 --seeds 0 1 2 --out models

Minutes a seed on one thread. No mask and no box is read. Captions are templates filled with an image's tags.
The tags name no background, so CLIP-ES's background words would stay without a meaning; one generic word gets
one: some views of an image show nothing but patches along its border, in shuffled places, and are captioned
"background". As many other views have their patches shuffled too, or the shuffling alone would tell.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from photo_clip import PhotoCLIPConfig, build_photo_clip, load_photo_clip, save_photo_clip
from photo_views import StemFeatures, Training, View, caption, squeeze
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.data import VOCDataModule
from vpl_lightning.data.images import TaggedImages

CLASSES = Path(__file__).with_name("photo_classes.yaml")
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


def train(
    photos: StemFeatures, config: PhotoCLIPConfig, settings: Training, classes: ClassSet, seed: int
) -> tuple[Any, Int[Tensor, " tokens"]]:
    """Train one model; return it and the ids of the tokens that its captions had."""
    from open_clip.tokenizer import SimpleTokenizer

    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = build_photo_clip(config)
    for buffer, value in zip(("mean", "std"), photos.statistics(), strict=True):
        getattr(model.visual.conv1, buffer).copy_(value)
    tokenizer = SimpleTokenizer(context_length=config.context_length)
    optimizer = _optimizer(model, settings)
    order = balanced_order(photos.tags, settings.steps * settings.batch, draw)
    seen: set[int] = set()
    begun = time.monotonic()
    for step in range(settings.steps):
        done = step / settings.steps
        rise = min(1.0, (done + 1 / settings.steps) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rise * 0.5 * (1 + math.cos(math.pi * done))
        rows = order[step * settings.batch : (step + 1) * settings.batch]
        views = [photos.view(row, settings, draw) for row in rows]
        named = dict(caption(view.tags, classes, settings, draw) for view in views)
        tokens = tokenizer(list(named))
        seen.update(tokens.unique().tolist())
        fits = torch.tensor([[tags <= view.tags for tags in named.values()] for view in views])
        cosines = _encode_views(model, views) @ F.normalize(model.encode_text(tokens), dim=-1).T
        loss = contrastive_loss(
            settings.scales[0] ** (1 - done) * settings.scales[1] ** done * cosines, fits.float()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == settings.steps:
            print(
                f"seed {seed} step {step} loss {loss.item():.3f} {time.monotonic() - begun:.0f} s", flush=True
            )
    with torch.no_grad():
        model.logit_scale.fill_(math.log(settings.scales[1]))
    return model.eval(), torch.tensor(sorted(seen))


def contrastive_loss(logits: Float[Tensor, "B texts"], fits: Float[Tensor, "B texts"]) -> Float[Tensor, ""]:
    """InfoNCE both ways; all captions that fit an image, and all images that fit a caption, count the same.

    Args:
        logits: Scaled cosines.
        fits: 1 where every tag that the caption names is a tag of the image.
    """
    by_image = -(F.log_softmax(logits, 1) * fits).sum(1) / fits.sum(1)
    by_text = -(F.log_softmax(logits, 0) * fits).sum(0) / fits.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


def balanced_order(tags: Sequence[frozenset[int]], length: int, draw: random.Random) -> list[int]:
    """Draw images, those with a rare tag more often: by the inverse root of its frequency."""
    counts = Counter(tag for one in tags for tag in one)
    weights = [max(counts[tag] ** -0.5 for tag in one) for one in tags]
    return draw.choices(range(len(tags)), weights, k=length)


def zero_shot(encoder: CLIPEncoder, images: TaggedImages, grid: int, classes: ClassSet) -> dict[str, float]:
    """Return in per cent how often a tag ranks first, and the mean average precision over the classes."""
    text = encoder.encode_classes(classes)[: len(classes.foreground)]
    rows = [encoder.encode_image(squeeze(images[row]["image"], grid)[None]) for row in range(len(images))]
    cosines = (F.normalize(torch.cat(rows), dim=-1) @ text.T).numpy()
    truth = np.zeros(cosines.shape, bool)
    for row in range(len(images)):
        truth[row, images.labels(row)] = True
    first = truth[np.arange(len(truth)), cosines.argmax(1)]
    precisions = []
    for c in np.flatnonzero(truth.any(0)):
        ranked = truth[np.argsort(-cosines[:, c], kind="stable"), c]
        precisions.append((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean())
    return {"top1": 100 * float(first.mean()), "map": 100 * float(np.mean(precisions))}


def _optimizer(model: Any, settings: Training) -> torch.optim.AdamW:
    """Decay the matrices, not the embeddings; leave the logit scale to its schedule."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "logit_scale":
            groups[parameter.ndim > 1 and "embedding" not in name].append(parameter)
    decays = [
        {"params": groups[True], "weight_decay": settings.decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(decays, lr=settings.rate, betas=(0.9, 0.98))


def _encode_views(model: Any, views: Sequence[View]) -> Float[Tensor, "B D"]:
    """Return unit image features, pooled at the class token, of views that show some patches only."""
    visual = model.visual
    places = torch.stack([view.places for view in views])
    patches = visual.conv1.project(torch.stack([view.features for view in views]).float())
    patches = patches + visual.positional_embedding[1:][places]
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(views), 1, -1)
    tokens = visual.transformer(visual.ln_pre(torch.cat([first, patches], 1)))
    return F.normalize(visual.ln_post(tokens[:, 0]) @ visual.proj, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", required=True, help="VOC2012 or VOCdevkit")
    parser.add_argument("--train", default="train_aug", help="list in ImageSets/Segmentation to train on")
    parser.add_argument("--score", default="val", help="list whose tags score the models and choose nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--out", type=Path, required=True, help="folder of photo_clip_seed<seed>.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, settings = PhotoCLIPConfig(), Training(steps=args.steps)
    data = VOCDataModule(args.root, classes=str(CLASSES), train_split=args.train, val_split=args.score)
    begun = time.monotonic()
    photos, held_out = (
        StemFeatures(data.localisation_dataset("train"), config),
        data.localisation_dataset("val"),
    )
    print(f"stem features of {len(photos.tags)} images, twice: {time.monotonic() - begun:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        begun = time.monotonic()
        model, tokens = train(photos, config, settings, data.classes, seed)
        seconds = time.monotonic() - begun
        scores = zero_shot(CLIPEncoder(model), held_out, config.grid, data.classes)
        notes = {
            "command": " ".join(["python", *sys.argv]),
            "seed": str(seed),
            "seconds": f"{seconds:.0f}",
            "training": json.dumps(asdict(settings)),
            "scores": json.dumps({"list": args.score, **scores}),
        }
        path = args.out / f"photo_clip_seed{seed}.safetensors"
        save_photo_clip(model, config, path, tokens=tokens, notes=notes)
        load_photo_clip(str(path))
        print(f"{path.name}: {args.score} top-1 {scores['top1']:.1f}, mAP {scores['map']:.1f}", flush=True)


if __name__ == "__main__":
    main()

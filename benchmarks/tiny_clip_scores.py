"""Score a tiny CLIP on drawn scenes: zero-shot top-1, and mIoU of its text Grad-CAM maps as CLIP-ES makes them.

Written apart from the library's generator, with autograd and one image at a time: it chose the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.data.scenes import BACKGROUNDS, CLASSES, Scene, render_scene

DEV_SERIES = 900_000
"""Series of scenes that chose the recipe; apart from all training series and from the data module's."""
TEMPLATE = "a clean origami {}."
SOFTMAX_SCALES = (100.0, 1 / 0.03, 1 / 0.1)
BACKGROUND_POWERS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Exponents of the background score (1 - largest map); the best is reported beside the first."""
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
"""CLIP's image normalisation."""

Encode = Callable[[Sequence[str]], Tensor]


def last_tokens(model: CLIP, images: Tensor) -> Tensor:
    """Return the tokens that enter the last block."""
    visual = model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1)
    tokens = visual.ln_pre(tokens + visual.positional_embedding)
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    return tokens


def grad_cams(model: CLIP, tokens: Tensor, texts: Tensor, present: int, scale: float) -> Tensor:
    """Return the min-max normalised Grad-CAM maps (present, grid, grid) of the first ``present`` texts."""
    visual = model.visual
    block = visual.transformer.resblocks[-1]
    normed = block.ln_1(tokens).detach().requires_grad_()
    output = tokens + block.attn(normed, normed, normed, need_weights=False)[0]
    output = output + block.mlp(block.ln_2(output))
    feature = F.normalize(visual.ln_post(output)[0, 1:].mean(0) @ visual.proj, dim=0)
    scores = (scale * texts @ feature).log_softmax(0)
    maps = []
    for index in range(present):
        gradient = torch.autograd.grad(scores[index], normed, retain_graph=True)[0][0, 1:]
        cam = F.relu(normed[0, 1:].detach() @ gradient.mean(0))
        cam = cam - cam.min()
        maps.append(cam / (1e-7 + cam.max()))
    grid = round(len(maps[0]) ** 0.5)
    return torch.stack(maps).view(present, grid, grid)


def confusion(scene: Scene, maps: Tensor, power: float) -> np.ndarray:
    """Return the confusion matrix of one scene's label map."""
    size, count = scene.mask.shape[0], len(CLASSES) + 1
    fine = F.interpolate(maps[None], size=(size, size), mode="bilinear", align_corners=False)[0].numpy()
    names = np.array(scene.labels) + 1
    labels = np.where((1 - fine.max(0)) ** power >= fine.max(0), 0, names[fine.argmax(0)])
    return np.bincount(scene.mask.ravel().astype(int) * count + labels.ravel(), minlength=count**2).reshape(
        count, count
    )


def mean_iou(matrix: np.ndarray) -> float:
    """Return the mean intersection over union in per cent."""
    hits = np.diag(matrix)
    return float(100 * (hits / np.maximum(matrix.sum(0) + matrix.sum(1) - hits, 1)).mean())


def score(model: CLIP, tokenize: Encode, *, scenes: int) -> dict[str, float]:
    """Return top-1 of scenes with one class, and text-map mIoU at several softmax scales."""
    drawn = [render_scene(DEV_SERIES, index) for index in range(scenes)]
    pixels = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        images = (pixels / 255 - MEAN) / STD
        features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(50)])
        tokens = torch.cat([last_tokens(model, part) for part in images.split(50)])
        prompts = [TEMPLATE.format(name) for name in (*CLASSES, *BACKGROUNDS)]
        texts = model.encode_text(tokenize(prompts), normalize=True)
    single = [i for i, scene in enumerate(drawn) if len(scene.labels) == 1]
    guesses = (features[single] @ texts[: len(CLASSES)].T).argmax(1)
    truth = torch.tensor([drawn[i].labels[0] for i in single])
    result = {"scenes": float(scenes), "top1": round(float((guesses == truth).float().mean()), 3)}
    for scale in SOFTMAX_SCALES:
        matrices = np.zeros((len(BACKGROUND_POWERS), len(CLASSES) + 1, len(CLASSES) + 1))
        for index, scene in enumerate(drawn):
            rows = torch.cat([texts[list(scene.labels)], texts[len(CLASSES) :]])
            maps = grad_cams(model, tokens[index : index + 1], rows, len(scene.labels), scale)
            for number, power in enumerate(BACKGROUND_POWERS):
                matrices[number] += confusion(scene, maps, power)
        values = [mean_iou(matrix) for matrix in matrices]
        result[f"miou_scale_{scale:.0f}"] = round(values[0], 1)
        result[f"miou_scale_{scale:.0f}_best_power"] = round(max(values), 1)
    return result

"""CLIP-ES from its description alone: one image and one class at a time, numpy, OpenCV and plain autograd.

Shares no code with the library. It reads a state dict of the vision tower and follows the released
procedure literally: softmax probabilities are differentiated, contours are OpenCV's, the affinity matrix is
formed and squared.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(a: Tensor, state: dict[str, Tensor], name: str, heads: int) -> tuple[Tensor, Tensor]:
    width = a.shape[-1]
    d = width // heads
    q, k, v = (a @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]).split(
        width, -1
    )
    outputs, maps = [], []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        attention = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(d), dim=-1)
        outputs.append(attention @ v[:, part])
        maps.append(attention)
    mixed = torch.cat(outputs, -1)
    out = mixed @ state[f"{name}.attn.out_proj.weight"].T + state[f"{name}.attn.out_proj.bias"]
    return out, torch.stack(maps).mean(0)


def feed_forward(x: Tensor, state: dict[str, Tensor], name: str, quick: bool) -> Tensor:
    hidden = x @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    if quick:
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    else:
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def preprocess(image: np.ndarray, patch: int) -> np.ndarray:
    rows, columns = (math.ceil(side / patch) * patch for side in image.shape[:2])
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC)
    return (np.asarray(resized, np.float32) / 255 - MEAN) / STD


def embed(pixels: np.ndarray, state: dict[str, Tensor], patch: int) -> tuple[Tensor, tuple[int, int]]:
    h, w = pixels.shape[0] // patch, pixels.shape[1] // patch
    patches = pixels.reshape(h, patch, w, patch, 3).transpose(0, 2, 4, 1, 3).reshape(h * w, -1)
    kernel = state["conv1.weight"]
    tokens = torch.from_numpy(np.ascontiguousarray(patches)) @ kernel.reshape(len(kernel), -1).T
    table = state["positional_embedding"]
    native = round(math.sqrt(len(table) - 1))
    if (h, w) == (native, native):
        grid = table[1:]
    else:
        planes = table[1:].reshape(native, native, -1).numpy()
        resized = [cv2.resize(np.ascontiguousarray(planes[..., c]), (w, h)) for c in range(planes.shape[-1])]
        grid = torch.from_numpy(
            np.stack(resized, -1).reshape(h * w, -1).astype(np.float16).astype(np.float32)
        )
        table = table.half().float()
    first = state["class_embedding"] + table[0]
    return layer_norm(torch.cat([first[None], tokens + grid]), state, "ln_pre"), (h, w)


def scale_map(values: np.ndarray) -> np.ndarray:
    values = values - values.min()
    return values / (1e-7 + values.max())


def boxes(cam: np.ndarray, threshold: float) -> list[tuple[int, int, int, int]]:
    height, width = cam.shape
    grey = (cam * 255).astype(np.uint8)[..., None]
    _, binary = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    found = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        found.append((x, y, min(x + w, width - 1), min(y + h, height - 1)))
    return found or [(0, 0, 0, 0)]


def transition(attention: list[np.ndarray]) -> np.ndarray:
    matrix = np.mean(attention, axis=0)
    for _ in range(3):
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    matrix = (matrix + matrix.T) / 2
    return matrix @ matrix


def clip_es(
    image: np.ndarray,
    label: int,
    labels: list[int],
    *,
    state: dict[str, Tensor],
    foreground: Tensor,
    background: Tensor,
    heads: int,
    patch: int,
    threshold: float,
    quick: bool = True,
    scale: float = 100.0,
    averaged: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the map on the patch grid and the refined map at image size of one class."""
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks"))
    tokens, (h, w) = embed(preprocess(image, patch), state, patch)
    maps = []
    for block in range(depth - 1):
        name = f"transformer.resblocks.{block}"
        mixed, attention = attend(layer_norm(tokens, state, f"{name}.ln_1"), state, name, heads)
        tokens = tokens + mixed
        tokens = tokens + feed_forward(layer_norm(tokens, state, f"{name}.ln_2"), state, name, quick)
        maps.append(attention)
    name = f"transformer.resblocks.{depth - 1}"
    target = layer_norm(tokens, state, f"{name}.ln_1").detach().requires_grad_()
    mixed, attention = attend(target, state, name, heads)
    maps.append(attention.detach())
    after = tokens + mixed
    after = after + feed_forward(layer_norm(after, state, f"{name}.ln_2"), state, name, quick)
    feature = layer_norm(after, state, "ln_post")[1:].mean(0) @ state["proj"]
    feature = feature / feature.norm()
    texts = torch.cat([foreground[labels], background])
    probability = torch.softmax(scale * (texts @ feature), 0)[labels.index(label)]
    (gradient,) = torch.autograd.grad(probability, target)
    channels = gradient[1:].numpy().T.reshape(-1, h, w)
    weights = channels.mean(axis=(1, 2), dtype=np.float64)
    activations = target.detach()[1:].numpy().T.reshape(-1, h, w)
    cam = np.maximum((weights[:, None, None] * activations).sum(0), 0)
    cam = scale_map(scale_map(cam)).astype(np.float32)

    kept = [one[1:, 1:].numpy() for one in maps[-averaged:]]
    mask = np.zeros((h, w))
    for x0, y0, x1, y1 in boxes(cam, threshold):
        mask[y0:y1, x0:x1] = 1
    masked = transition(kept) * mask.reshape(1, -1)
    refined = scale_map((masked @ cam.reshape(-1, 1)).reshape(h, w)).astype(np.float32)
    return cam, cv2.resize(refined, (image.shape[1], image.shape[0]))

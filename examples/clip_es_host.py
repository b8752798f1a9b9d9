# ruff: noqa: D101, D102
"""A host in the manner of CLIP-ES, with blocks of either convention, turned into VPL by four lines."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from vpl_lightning import VPLPlugin  # line 1


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):  # OpenAI's returns a tensor, that of CLIP-ES's fork a pair
    def __init__(self, width, returns_pair):
        super().__init__()
        first, second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=first, gelu=QuickGELU(), c_proj=second))
        self.attn, self.returns_pair = nn.MultiheadAttention(width, 2), returns_pair
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        mixed, attention = self.attn(*3 * [self.ln_1(x)])
        x = x + mixed + self.mlp(self.ln_2(x + mixed))
        return (x, attention) if self.returns_pair else x


class Host(nn.Module):
    def __init__(self, returns_pair, width=32, joint=16):
        super().__init__()
        self.visual, blocks = nn.Module(), [Block(width, returns_pair) for _ in range(3)]
        self.visual.conv1, self.visual.ln_post = nn.Conv2d(3, width, 8, 8), nn.LayerNorm(width)
        self.visual.proj, self.visual.transformer = nn.Parameter(torch.randn(width, joint)), nn.Module()
        self.visual.transformer.resblocks = nn.Sequential(*blocks)

    def encode_image(self, image):
        x = self.visual.conv1(image).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        for block in self.visual.transformer.resblocks[:-1]:
            x = block(x)[0] if block.returns_pair else block(x)
        return x


def run(model, images, fg_text_features, bg_text_features):
    plugin = VPLPlugin(model, fg_text_features, bg_text_features)  # line 2
    for image, label_ids in images:
        image_features = model.encode_image(image)  # before the last block, (L, 1, width)
        patches = image_features[1:, 0] @ model.visual.proj
        cams = (patches @ fg_text_features[label_ids].T).sigmoid().T.unflatten(1, (-1, image.shape[-1] // 8))
        plugin.observe(image_features, cams, label_ids)  # line 3; the host's own maps stand above
    return plugin.fit()  # line 4


if __name__ == "__main__":
    text = F.normalize(torch.randn(8, 16), dim=-1)
    print(run(Host(returns_pair=True), [(torch.randn(1, 3, 48, 64), [1, 4])], text[:5], text[5:]))

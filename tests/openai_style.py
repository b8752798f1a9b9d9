"""A CLIP as OpenAI's code builds it (tokens first, batch second), written for the tests as an independent forward."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Registers ``attn`` before ``ln_1``, as OpenAI's does."""

    def __init__(self, width: int, heads: int, causal: bool, activation: type[nn.Module]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=activation(), c_proj=nn.Linear(4 * width, width)
            )
        )
        self.ln_2 = nn.LayerNorm(width)
        self.causal = causal

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = None
        if self.causal:
            mask = torch.full((len(x), len(x)), float("-inf"), device=x.device).triu(1).to(x.dtype)
        return self.attn(x, x, x, need_weights=True, attn_mask=mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))[0]
        return x + self.mlp(self.ln_2(x))


class PairBlock(Block):
    """Returns its attention too, as the blocks of CLIP-ES's fork do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mixed, attention = self.attention(self.ln_1(x))
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), attention


class Transformer(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, joint: int, blocks: list[Block]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(blocks)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, joint))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenAIStyleCLIP(nn.Module):
    """Same parameter names as open_clip's CLIP, so that a state dict of :func:`tests.models.tiny_clip` fits."""

    def __init__(
        self,
        *,
        width: int = 64,
        layers: int = 4,
        heads: int = 2,
        patch_size: int = 8,
        image_size: int = 32,
        joint_width: int = 32,
        context_length: int = 77,
        vocab_size: int = 49408,
        activation: type[nn.Module] = QuickGELU,
        block: type[Block] = Block,
        markers: bool = True,
    ) -> None:
        super().__init__()
        vision = [block(width, heads, False, activation) for _ in range(layers)]
        self.visual = VisionTransformer(image_size, patch_size, width, joint_width, vision)
        self.transformer = Transformer([block(64, 1, True, activation) for _ in range(2)])
        self.token_embedding = nn.Embedding(vocab_size, 64)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, joint_width))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        if markers:
            self.register_buffer("input_resolution", torch.tensor(image_size))
            self.register_buffer("context_length", torch.tensor(context_length))
            self.register_buffer("vocab_size", torch.tensor(vocab_size))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(text)


def openai_style(state: dict[str, Tensor], **options: object) -> OpenAIStyleCLIP:
    """Return the model with the weights of an open_clip state dict."""
    text = {
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
    }
    model = OpenAIStyleCLIP(**text, **options)  # type: ignore[arg-type]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"input_resolution", "context_length", "vocab_size"}
    return model.eval()

"""Linear maps of a frozen network."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ONEDNN = bool(
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)
"""Whether large products on the CPU are oneDNN's: MKL leaves AVX-512 unused on AMD's processors."""
SMALLEST_PRODUCT = 1 << 21
"""Multiplications below which a copy into oneDNN's tensors costs more than it saves."""


def linear(
    x: Float[Tensor, "*B fan_in"],
    weight: Float[Tensor, "fan_out fan_in"],
    bias: Float[Tensor, " fan_out"] | None = None,
) -> Float[Tensor, "*B fan_out"]:
    """Return ``x @ weight.T + bias``, as :func:`torch.nn.functional.linear` does.

    Large float32 products on a CPU that need no graph may be oneDNN's, which adds up in another order.
    """
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if ONEDNN and plain and not graph and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT:
        x = x.to_mkldnn()
    found: Tensor = F.linear(x, weight, bias)
    return found.to_dense() if found.is_mkldnn else found

"""What all ranks have, in one place, with exact gradients under data-parallel training."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed

Item = TypeVar("Item")


def gather_rows(rows: Shaped[Tensor, "R *shape"]) -> Shaped[Tensor, "total *shape"]:
    """Concatenate the rows of all ranks, in the order of ranks; ranks may have different numbers of them.

    Gradients reach this rank's rows alone, times the number of ranks: data-parallel training averages the
    ranks' gradients, so that a loss over all rows has the gradient which one process with all the data
    would compute. Every rank must call this, even one without rows. Alone, it returns what it is given.
    """
    if _alone():
        return rows
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    # Not every backend gathers bool, or tensors of different sizes.
    own = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded)
    found = [part[: int(count)].to(rows.dtype) for part, count in zip(parts, counts, strict=True)]
    if rows.requires_grad:
        found[rank] = rows * ranks - rows.detach() * (ranks - 1)
    return torch.cat(found)


def gather_list(items: list[Item]) -> list[Item]:
    """Concatenate the lists of all ranks, in the order of ranks; every rank must call this."""
    if _alone():
        return items
    parts: list[list[Item]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def _alone() -> bool:
    joined = distributed.is_available() and distributed.is_initialized()
    return not joined or distributed.get_world_size() == 1

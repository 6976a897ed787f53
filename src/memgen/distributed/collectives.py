"""Collective operations over the ranks that train together; with one process, the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """Rank of this process among them."""
    return torch.distributed.get_rank() if _distributed() else 0


def over_ranks(values: Tensor, how: str) -> Tensor:
    """All-reduces each number over all ranks. The result is on the host.

    Args:
        values: any shape, equal on all ranks.
        how: "sum", "min" or "max".
    """
    if not _distributed():
        return values
    operation = {
        "sum": torch.distributed.ReduceOp.SUM,
        "min": torch.distributed.ReduceOp.MIN,
        "max": torch.distributed.ReduceOp.MAX,
    }[how]
    moved = values.to(_collective_device())
    torch.distributed.all_reduce(moved, operation)
    return moved.cpu()


def of_all_ranks(values: Tensor) -> Tensor:
    """All-gathers equally many values per rank, concatenated in rank order, on the host."""
    if not _distributed():
        return values
    moved = values.to(_collective_device()).contiguous()
    gathered = [torch.empty_like(moved) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, moved)
    return torch.cat(gathered).cpu()


def ragged_of_all_ranks(values: Tensor) -> Tensor:
    """As `of_all_ranks` for one dimension of different lengths."""
    counts = of_all_ranks(torch.tensor([len(values)])).tolist()
    longest = max(counts)
    padded = torch.cat([values, values.new_zeros(longest - len(values))])
    rows = of_all_ranks(padded).view(len(counts), longest)
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])


def objects_of_all_ranks(value: Any) -> list[Any]:
    """All-gathers one picklable object per rank, in rank order."""
    if not _distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def stats_over_ranks(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of all ranks, which have the same names: extremes where these end in `_min` or `_max`, else sums."""
    merged: dict[str, Tensor] = {}
    for how in ("sum", "min", "max"):
        names = sorted(name for name in stats if _reduction(name) == how)
        if names:
            values = over_ranks(torch.stack([stats[name].double().cpu() for name in names]), how)
            merged |= dict(zip(names, values, strict=True))
    return merged


def _reduction(name: str) -> str:
    return name.rpartition("_")[2] if name.endswith(("_min", "_max")) else "sum"


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _collective_device() -> torch.device:
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

"""What several processes share; with one process each of these is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def gather(rows: Tensor) -> Tensor:
    """(world*B, ...) rows of all ranks in rank order, with gradient to each rank's own."""
    if world() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


def total(counts: dict[str, int], device: torch.device | str = "cpu") -> dict[str, int]:
    """Counts summed over ranks."""
    if world() == 1:
        return counts
    names = sorted(counts)
    sums = torch.tensor([counts[n] for n in names], device=device)
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))

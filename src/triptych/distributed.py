"""What several processes share; with one process each of these is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.types import Tokens


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


def gather_tokens(tokens: Tokens) -> Tokens:
    """The ids, positions and segments of all ranks, padded to the widest."""
    if world() == 1:
        return tokens
    width = torch.tensor(tokens.ids.shape[1], device=tokens.ids.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    more = int(width) - tokens.ids.shape[1]
    rows = (
        torch.nn.functional.pad(x, (0, more))
        for x in (tokens.ids, tokens.positions, tokens.segments)
    )
    return Tokens(*(gather_constant(r.contiguous()) for r in rows))


def gather_constant(rows: Tensor) -> Tensor:
    """(world*B, ...) rows of all ranks in rank order, for tensors without gradient."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)

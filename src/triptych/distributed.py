"""What several processes share; with one process each of these is the identity."""

from __future__ import annotations

import os
from typing import Any

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


def start() -> None:
    """Join the processes that torchrun started, unless a trainer has done it already."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo")


def wait() -> None:
    """Go on when every process has come here."""
    if world() > 1:
        dist.barrier()


def share(value: Any) -> Any:
    """The first process's plain value, on every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(rows: Tensor) -> Tensor:
    """(world*B, ...) rows of all ranks in rank order, with gradient to each rank's own."""
    if world() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()  # (world*B, ...): what every rank's loss asks of all rows
        dist.all_reduce(grad)
        return grad[rank() * ctx.size :][: ctx.size]


def shift(rows: Tensor) -> Tensor:
    """(B, ...) the rows of the rank before this one, in a ring; gradients travel back."""
    return rows if world() == 1 else _Shift.apply(rows)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _exchange(rows, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _exchange(grad, -1)


def _exchange(rows: Tensor, step: int) -> Tensor:
    """Send to the rank `step` ahead and receive from the one `step` behind."""
    rows, received = (
        rows.contiguous(),
        torch.empty_like(rows, memory_format=torch.contiguous_format),
    )
    ahead, behind = (rank() + step) % world(), (rank() - step) % world()
    ops = [dist.P2POp(dist.isend, rows, ahead), dist.P2POp(dist.irecv, received, behind)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return received


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

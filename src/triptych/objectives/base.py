"""The contract of an objective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from triptych.data.rows import RowPlan
from triptych.types import Batch, Term


class Objective(nn.Module):
    """Named terms of a loss, each a sum whose count the trainer divides by.

    `counts` needs labels and sources alone, so that the counts of a whole accumulation window
    and of all ranks are known before its first forward.
    `in_batch` terms compare the samples of one micro-batch with each other, so splitting the batch
    changes them: plain accumulation is refused. `plan` orders an epoch's samples into batches.
    """

    in_batch = False
    plan: type[RowPlan] = RowPlan
    saves_memory = False  # whether it computes again in order to hold less
    progress = 0.0  # epochs done, for ramps; set by the trainer before each forward

    def check(self, model: nn.Module, ranks: int) -> None:
        """Refuse, before the first step, a model that this objective cannot train on `ranks`."""

    def counts(self, batch: Batch) -> dict[str, int]:
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError


def shares(terms: dict[str, Term], counts: dict[str, int]) -> dict[str, Tensor]:
    """Each term as it enters the loss: weight x sum / count over the whole effective batch."""
    return {name: t.weight * t.sum / max(1, counts[name]) for name, t in terms.items()}


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in its tensors' own precision; "meta" (memory forecasts) has no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

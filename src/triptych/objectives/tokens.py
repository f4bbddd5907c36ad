"""Token objectives: next-token prediction on the supervised positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.objectives.base import Objective
from triptych.parts.attention import predecessors
from triptych.types import IGNORE, Batch, Term


class NextToken(Objective):
    """Cross-entropy of each supervised token given what precedes it in its own sample.

    The head runs only where there is a label, `chunk` positions at a time and again in the
    backward pass, so the (tokens x vocabulary) matrix never exists.
    """

    def __init__(self, chunk: int = 1024) -> None:
        super().__init__()
        self.chunk = chunk

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next_token": int((batch.text["language"].labels != IGNORE).sum())}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        tokens = batch.text["language"]
        hidden = model(batch)  # (B,T,D)
        rows, columns = (tokens.labels != IGNORE).nonzero(as_tuple=True)  # (N,)
        before = predecessors(tokens)[rows, columns]  # the one shift of labels
        scored, labels = hidden[rows, before], tokens.labels[rows, columns]  # (N,D), (N,)
        return {"next_token": Term(chunked_nll(model.language.logits, scored, labels, self.chunk))}


def chunked_nll(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """Sum of -log p(label) over (N,D) states, in float32; memory follows chunk x V, not N x V."""

    def nll(states: Tensor, gold: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), gold, reduction="sum")

    if len(labels) <= chunk:
        return nll(hidden, labels)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([checkpoint(nll, h, y, use_reentrant=False) for h, y in parts]).sum()

"""Token objectives: next-token prediction on the supervised positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.objectives.base import Objective
from triptych.objectives.fused_head import fused_nll
from triptych.parts.attention import predecessors
from triptych.types import IGNORE, Batch, Term, Tokens, TriptychError


class NextToken(Objective):
    """Cross-entropy of each supervised token given what precedes it in its own sample.

    The head runs only where there is a label, `chunk` positions at a time and again in the
    backward pass, so the (tokens x vocabulary) matrix never exists.
    weights: one a data set, by `Sample.source`. The loss is then their weighted sum of means, one
    mean a data set (Flamingo, arXiv 2204.14198, section 2.4); without it, the mean of all tokens.
    """

    def __init__(self, chunk: int = 1024, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.chunk, self.weights = chunk, dict(weights or {})

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = written(batch)
        if not self.weights:
            return {"next_token": int((tokens.labels != IGNORE).sum())}
        source = self._sources(batch)[owners(tokens)[tokens.labels != IGNORE]]  # (N,)
        return {f"next_token/{n}": int((source == i).sum()) for i, n in enumerate(self.weights)}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        tokens = written(batch)
        rows, columns = (tokens.labels != IGNORE).nonzero(as_tuple=True)  # (N,)
        before = predecessors(tokens)[rows, columns]  # the one shift of labels
        read = torch.zeros_like(tokens.mask).index_put((rows, before), tokens.mask.new_ones(()))
        hidden = model(batch, scored=read)  # (B,T,D)
        scored, labels = hidden[rows, before], tokens.labels[rows, columns]  # (N,D), (N,)
        if not self.weights:
            return {"next_token": Term(self._nll(model, scored, labels))}
        source = self._sources(batch)[owners(tokens)[rows, columns]]  # (N,)
        terms = {}
        for i, (name, weight) in enumerate(self.weights.items()):
            own = source == i
            nll = self._nll(model, scored[own], labels[own])
            terms[f"next_token/{name}"] = Term(nll, weight)
        return terms

    def _nll(self, model: nn.Module, scored: Tensor, labels: Tensor) -> Tensor:
        """() the sum over (N,D) states: the fused kernel where there is one, else in chunks."""
        nll = fused_nll(model, scored, labels)
        return chunked_nll(model.logits, scored, labels, self.chunk) if nll is None else nll

    def _sources(self, batch: Batch) -> Tensor:
        """The place in `weights` of each sample's data set."""
        names = list(self.weights)
        odd = next((s for s in batch.samples if s.source not in self.weights), None)
        if odd is not None:
            raise TriptychError(
                f"sample '{odd.id}' is of the data set '{odd.source}', for which "
                f"objective.weights has no number; it names {', '.join(names)}."
            )
        places = [names.index(s.source) for s in batch.samples]
        return torch.tensor(places, device=written(batch).ids.device)


def owners(tokens: Tokens) -> Tensor:
    """(B,T) which of the batch's samples a token belongs to; of no meaning outside segments."""
    held = tokens.segments.amax(1)  # (B,) samples a row holds
    first = held.cumsum(0) - held
    return (first[:, None] + tokens.segments - 1).clamp_min(0)


def written(batch: Batch) -> Tokens:
    """The rows a model is to write: the decoder's if it has one, else the language rows."""
    return batch.text.get("decoder") or batch.text["language"]


def chunked_nll(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    chunk: int,
    smoothing: float = 0.0,
) -> Tensor:
    """Sum of -log p(label) over (N,D) states, in float32; memory follows chunk x V, not N x V."""

    def nll(states: Tensor, gold: Tensor) -> Tensor:
        logits = head(states).float()
        return F.cross_entropy(logits, gold, reduction="sum", label_smoothing=smoothing)

    if len(labels) <= chunk:
        return nll(hidden, labels)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([checkpoint(nll, h, y, use_reentrant=False) for h, y in parts]).sum()


class MaskedTags(Objective):
    """Cross-entropy of masked tokens, and of whether the tags belong to the image (OSCAR).

    A row's first state answers the second question (arXiv 2004.06165, equations 2 to 4); rows of
    questions have none and train the first term alone.
    """

    def __init__(self, chunk: int = 1024) -> None:
        super().__init__()
        self.chunk = chunk

    def counts(self, batch: Batch) -> dict[str, int]:
        masked = {"masked": int((batch.text["language"].labels != IGNORE).sum())}
        return masked | ({"tags": len(batch.samples)} if "match" in batch.text else {})

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        tokens = batch.text["language"]
        hidden = model(batch)  # (B,T,D)
        masked = tokens.labels != IGNORE  # (B,T)
        nll = chunked_nll(model.logits, hidden[masked], tokens.labels[masked], self.chunk)
        terms = {"masked": Term(nll)}
        if "match" in batch.text:
            flags = batch.text["match"].labels[:, 0]  # (B,) 1 = polluted
            logits = model.heads(hidden[:, 0])  # (B,2)
            terms["tags"] = Term(F.cross_entropy(logits.float(), flags, reduction="sum"))
        return terms

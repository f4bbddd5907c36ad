"""Contrast, match and describe: the three terms of BLIP and of BLIP-2's first stage."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.distributed import gather, gather_constant, gather_tokens, rank
from triptych.objectives.base import Objective
from triptych.objectives.tokens import chunked_nll
from triptych.parts.attention import predecessors
from triptych.types import IGNORE, Batch, Term, Tokens, TriptychError


class ImageText(Objective):
    """ITC + ITM + LM, 1 : 1 : 1.

    itc: cross-entropy both ways between the rows' similarities; with a momentum teacher against
    its embeddings and the queue, with soft targets whose share grows to `soft` over `ramp` epochs
    (BLIP, arXiv 2201.12086, section 3.2); without one against all ranks, with label `smoothing`
    (BLIP-2, 2301.12597, LAVIS `blip2_qformer.py`). itm: each pair, and one hard negative image and
    text for it, drawn by softmax of the similarities, from this rank or from all `ranks`.
    lm: the text over its image, with label smoothing 0.1 as in both code bases.
    """

    in_batch = True

    def __init__(
        self,
        smoothing: float = 0.0,
        soft: float = 0.4,
        ramp: float = 2.0,
        negatives: Literal["local", "ranks"] = "local",
        lm_smoothing: float = 0.1,
        chunk: int = 1024,
    ) -> None:
        super().__init__()
        if negatives not in ("local", "ranks"):
            raise TriptychError(f"objective.negatives is '{negatives}'; it takes local or ranks.")
        self.smoothing, self.soft, self.ramp = smoothing, soft, ramp
        self.negatives, self.lm_smoothing, self.chunk = negatives, lm_smoothing, chunk

    def counts(self, batch: Batch) -> dict[str, int]:
        if "text" not in batch.text:
            raise TriptychError(
                "this objective compares captions with images and the data brings questions; use "
                "captions (data.train.kind=captions), or objective=next_token to answer."
            )
        rows = len(batch.text["text"].ids)
        written = int((batch.text["decoder"].labels != IGNORE).sum())
        return {"itc": rows, "itm": 3 * rows, "lm": written}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        from triptych.models.fusion_encoder import image_embeddings, text_embeddings

        states, real = model.states(batch.images)  # (U,P,D)
        index = batch.slots[:, 0]  # (B,)
        images = image_embeddings(model, states, real)[index]  # (B,K,E)
        texts = text_embeddings(model, batch.text["text"])  # (B,E)
        rows = states[index], None if real is None else real[index]
        return {
            "itc": Term(self.contrast(model, batch, images, texts)),
            "itm": Term(self.matching(model, batch, rows, images, texts)),
            "lm": Term(self.describing(model, batch, rows)),
        }

    def contrast(self, model: nn.Module, batch: Batch, images: Tensor, texts: Tensor) -> Tensor:
        """Sum over rows of the mean of both directions."""
        scale = model.heads.logit_scale.exp()
        if model.momentum is None:
            positives = torch.arange(len(texts), device=texts.device) + rank() * len(texts)
            to_text = scale * similarity(images, gather(texts))  # (B,W*B)
            to_image = scale * similarity(gather(images), texts).T
            return sum(
                F.cross_entropy(s, positives, reduction="sum", label_smoothing=self.smoothing) / 2
                for s in (to_text, to_image)
            )
        slow_images, slow_texts = model.teach(batch)  # (B,E)
        model.momentum.remember(slow_images, slow_texts)
        all_images = torch.cat([slow_images, model.momentum.images])  # (B+queue,E)
        all_texts = torch.cat([slow_texts, model.momentum.texts])
        share = self.soft * min(1.0, self.progress / self.ramp) if self.ramp else self.soft
        losses = []
        for fast, slow, others in (
            (images[:, 0], slow_images, all_texts),
            (texts, slow_texts, all_images),
        ):
            with torch.no_grad():
                targets = share * (scale * slow @ others.T).softmax(1)
                targets.diagonal().add_(1 - share)
            losses.append(-((scale * fast @ others.T).log_softmax(1) * targets).sum() / 2)
        return sum(losses)

    def matching(
        self,
        model: nn.Module,
        batch: Batch,
        rows: tuple[Tensor, Tensor | None],
        images: Tensor,
        texts: Tensor,
    ) -> Tensor:
        """Cross-entropy of B true pairs, B with another image and B with another text."""
        (states, real), tokens = rows, batch.text["text"]
        pool, pool_real, pool_tokens = states, real, tokens
        pool_images, pool_texts = images, texts
        keys = _keys(batch)
        pool_keys, offset = keys, 0
        if self.negatives == "ranks":
            pool, pool_tokens = gather(states), gather_tokens(tokens)
            pool_real = None if real is None else gather_constant(real)
            pool_images, pool_texts = gather(images), gather(texts)
            pool_keys, offset = gather_constant(keys), rank() * len(keys)
        with torch.no_grad():
            scale = model.heads.logit_scale.exp()
            same = keys[:, None] == pool_keys  # (B,pool)
            same[torch.arange(len(keys)), torch.arange(len(keys)) + offset] = True
            other_text = draw_negatives(scale * similarity(images, pool_texts), same)  # (B,)
            other_image = draw_negatives(scale * similarity(pool_images, texts).T, same)
        pair_states = torch.cat([states, pool[other_image], states])  # (3B,P,D)
        pair_real = None if real is None else torch.cat([real, pool_real[other_image], real])
        pair_tokens = _stack(tokens, tokens, _take(pool_tokens, other_text))
        logits = model.match_logits(pair_states, pair_real, pair_tokens)  # (3B,2)
        truth = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        truth[: len(keys)] = 1
        return F.cross_entropy(logits, truth, reduction="sum")

    def describing(
        self, model: nn.Module, batch: Batch, rows: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """Negative log-likelihood of the texts given their images."""
        tokens = batch.text["decoder"]
        hidden = model.connector.decode(*rows, tokens)  # (B,T,D)
        row, column = (tokens.labels != IGNORE).nonzero(as_tuple=True)
        scored = hidden[row, predecessors(tokens)[row, column]]  # (N,D)
        labels = tokens.labels[row, column]
        return chunked_nll(model.connector.logits, scored, labels, self.chunk, self.lm_smoothing)


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """(U,B) cosine of each image's best embedding with each text, from (U,K,E) and (B,E)."""
    return (images @ texts.T).amax(1)


def draw_negatives(scores: Tensor, same: Tensor) -> Tensor:
    """(B,) a column for each row, drawn by softmax of scores (B,pool) among the other images."""
    weights = (scores.softmax(1) + 1e-4).masked_fill(same, 0)
    if not weights.is_meta and bool((weights.sum(1) == 0).any()):  # no values in a dry run
        raise TriptychError(
            "a batch of one image alone has no negative to match against; raise data.batch_size, "
            "or set data.samples_per_row=1 and data.draw=1."
        )
    return torch.multinomial(weights, 1)[:, 0]


def _keys(batch: Batch) -> Tensor:
    """(B,) a number for each row's image, equal on all ranks for equal images."""
    numbers = [int(_digest(batch.images.keys[i]), 16) for i in batch.slots[:, 0].tolist()]
    return torch.tensor(numbers, device=batch.slots.device)


def _digest(key: str) -> str:
    """15 hexadecimal digits of a key, which fit a signed 64-bit number."""
    import hashlib

    return hashlib.sha1(key.encode()).hexdigest()[:15]


def _take(tokens: Tokens, rows: Tensor) -> Tokens:
    return Tokens(tokens.ids[rows], tokens.positions[rows], tokens.segments[rows])


def _stack(*parts: Tokens) -> Tokens:
    """Rows under each other, padded to the widest."""
    width = max(p.ids.shape[1] for p in parts)
    columns = [
        [F.pad(getattr(p, name), (0, width - p.ids.shape[1])) for p in parts]
        for name in ("ids", "positions", "segments")
    ]
    return Tokens(*(torch.cat(c) for c in columns))

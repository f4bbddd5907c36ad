"""Contrastive objectives over the pairs of a batch and of all ranks."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.utils.checkpoint import checkpoint

from triptych.data.rows import RowPlan, SpreadPlan
from triptych.distributed import gather, rank, shift, world
from triptych.objectives.base import Objective, without_autocast
from triptych.types import Batch, Term, Tokens, TriptychError

Positives = Literal["pairs", "captions", "either"]
BLOCK = 512  # rows of the sigmoid loss's similarity matrix that exist at a time


class Contrastive(Objective):
    """What the contrastive losses share: embeddings, in-batch positives, and their refusals.

    chunk: images and texts whose activations are held at a time; the towers run again in the
    backward pass, so that loss and gradients are those of one batch (0 = all at once).
    positives: "pairs" (as in the papers), "captions" (equal captions of a batch are all right), or
    "either" (equal captions, and all captions of one image).
    """

    in_batch = True

    def __init__(self, chunk: int = 0, positives: Positives = "pairs") -> None:
        super().__init__()
        if chunk < 0:
            raise TriptychError(f"objective.chunk is {chunk}; it takes 0 (no chunks) or more.")
        if positives not in ("pairs", "captions", "either"):
            raise TriptychError(
                f"objective.positives is '{positives}'; it takes pairs, captions or either."
            )
        self.chunk, self.positives = chunk, positives
        self.saves_memory = chunk > 0
        self.plan = RowPlan if positives == "either" else SpreadPlan

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"contrastive": len(batch.text["text"].ids)}

    def check(self, model: nn.Module, ranks: int) -> None:
        """Refuse BatchNorm whose statistics would be those of a part of the batch."""
        if not self.chunk and ranks == 1:
            return
        was = model.training
        model.train()
        moving = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
        model.train(was)
        cause = f"objective.chunk={self.chunk}" if self.chunk else f"{ranks} ranks"
        for name in moving:
            if self.chunk or not isinstance(model.get_submodule(name), SyncBatchNorm):
                raise TriptychError(
                    f"'{name}' is a BatchNorm that trains, and with {cause} its statistics are "
                    "those of a part of the batch; set model.vision.statistics=stored, freeze that "
                    "part (model.trains), choose a tower without BatchNorm, or use one device and "
                    "objective.chunk=0."
                )

    def embed(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,E) image and text embeddings in float32."""
        images, texts = model(batch, chunk=self.chunk)
        return images.float(), texts.float()

    def keys(self, batch: Batch) -> list[Tensor]:
        """(B,) numbers that are equal where two rows count as one pair; one tensor a reason."""
        tokens = batch.text["text"]
        found = [caption_keys(tokens)] if self.positives != "pairs" else []
        if self.positives == "either":
            names = [batch.images.keys[i] for i in batch.slots[:, 0].tolist()]
            found.append(
                torch.tensor([_number(n.encode()) for n in names], device=tokens.ids.device)
            )
        return found


class InfoNCE(Contrastive):
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020, fig. 3).

    Each rank scores its own rows against the columns of all ranks; gradients flow through both.
    `smoothing` is ALIGN's label smoothing (arXiv 2102.05918, section 5).
    """

    def __init__(
        self, smoothing: float = 0.0, chunk: int = 0, positives: Positives = "pairs"
    ) -> None:
        super().__init__(chunk, positives)
        self.smoothing = smoothing

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        images, texts = self.embed(model, batch)  # (B,E), (B,E)
        with without_autocast(images.device):
            scale = model.heads.logit_scale.float().exp()
            to_text = scale * images @ gather(texts).T  # (B, world*B)
            to_image = scale * texts @ gather(images).T
        losses = [self._nll(batch, logits) for logits in (to_text, to_image)]
        return {"contrastive": Term(sum(losses) / 2)}

    def _nll(self, batch: Batch, logits: Tensor) -> Tensor:
        """Sum over rows of the cross-entropy of their own column, or of all their positives."""
        own = torch.arange(len(logits), device=logits.device) + rank() * len(logits)
        keys = self.keys(batch)
        if not keys:
            return F.cross_entropy(logits, own, reduction="sum", label_smoothing=self.smoothing)
        equal = F.one_hot(own, logits.shape[1]).bool()
        for key in keys:
            equal = equal | (key[:, None] == gather(key)[None])
        return shared_nll(logits, equal, self.smoothing)


def shared_nll(logits: Tensor, equal: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of the mean over their positives (R,C) of -log p(positive | it and negatives).

    No positive of a row is a negative of another; sharing the softmax among them instead would
    change nothing for captions that are equal, since their columns are.
    """
    others = logits.masked_fill(equal, torch.finfo(logits.dtype).min / 2).logsumexp(1)  # (R,)
    each = F.softplus(others[:, None] - logits) * equal
    nll = each.sum(1) / equal.sum(1)
    even = logits.logsumexp(1) - logits.mean(1)
    return ((1 - smoothing) * nll + smoothing * even).sum()


class Sigmoid(Contrastive):
    """Every pair is a yes-or-no question (SigLIP, arXiv 2303.15343, equation 1).

    Texts go round the ranks in a ring (section 3.3 there), so that no rank ever holds more than
    BLOCK x B similarities, and the texts of one other rank.
    """

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        images, texts = self.embed(model, batch)  # (B,E), (B,E)
        heads = model.heads
        if heads.logit_bias is None:
            raise TriptychError(
                "the sigmoid loss needs a bias; set model.heads.bias (SigLIP starts at -10)."
            )
        scale, bias = heads.logit_scale.float().exp(), heads.logit_bias.float()
        keys = self.keys(batch)
        visiting = list(keys)
        total = images.new_zeros(())
        for hop in range(world()):
            own = torch.eye(len(images), device=images.device, dtype=torch.bool)
            equal = own if hop == 0 else torch.zeros_like(own)
            for key, other in zip(keys, visiting, strict=True):
                equal = equal | (key[:, None] == other[None])
            total = total + pairwise_nll(images, texts, scale, bias, equal)
            if hop + 1 < world():
                texts, visiting = shift(texts), [shift(key) for key in visiting]
        return {"contrastive": Term(total)}


def pairwise_nll(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, equal: Tensor
) -> Tensor:
    """Sum of -log sigmoid(+-(scale * cosine + bias)) over all pairs, + where `equal` (B,B)."""

    def nll(rows: Tensor, positive: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with without_autocast(rows.device):
            logits = scale * rows @ texts.T + bias  # (block,B)
        return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()

    if len(images) <= BLOCK:
        return nll(images, equal, scale, bias)
    blocks = zip(images.split(BLOCK), equal.split(BLOCK), strict=True)
    return torch.stack(
        [checkpoint(nll, i, e, scale, bias, use_reentrant=False) for i, e in blocks]
    ).sum()


def caption_keys(tokens: Tokens) -> Tensor:
    """(B,) a number for each caption as its tower sees it; equal captions have equal numbers."""
    rows = zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True)
    texts = [repr([i for i, seen in zip(ids, mask, strict=True) if seen]) for ids, mask in rows]
    return torch.tensor([_number(t.encode()) for t in texts], device=tokens.ids.device)


def _number(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)

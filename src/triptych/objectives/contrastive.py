"""Contrastive objectives over the pairs of a batch, gathered from all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from triptych.distributed import gather, rank
from triptych.objectives.base import Objective
from triptych.types import Batch, Term


class InfoNCE(Objective):
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020, fig. 3).

    Each rank scores its own rows against the columns of all ranks; gradients flow through both.
    `smoothing` is ALIGN's label smoothing (arXiv 2102.05918).
    """

    in_batch = True

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"contrastive": len(batch.text["text"].ids)}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        images, texts = model(batch)  # (B,E), (B,E)
        scale = model.heads.logit_scale.exp()
        positives = torch.arange(len(images), device=images.device) + rank() * len(images)
        to_text = scale * images @ gather(texts).T  # (B, world*B)
        to_image = scale * texts @ gather(images).T
        losses = [
            F.cross_entropy(logits, positives, reduction="sum", label_smoothing=self.smoothing)
            for logits in (to_text, to_image)
        ]
        return {"contrastive": Term(sum(losses) / 2)}

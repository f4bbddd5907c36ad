"""DualEncoder: a vision and a text tower that meet in one embedding space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.data.processor import CaptionProcessor, ImageLoader
from triptych.models.base import Model
from triptych.parts.text import TextEncoder
from triptych.parts.vision import VisionEncoder
from triptych.types import Batch, Images, Tokens


class Heads(nn.Module):
    """The projections to the shared width E and the learned scale (and bias) of similarities.

    scale: initial multiplier of the cosine, 1/0.07 in CLIP (arXiv 2103.00020, section 2.5), kept
    at most `max_scale` after each step. bias: the sigmoid loss's (SigLIP, arXiv 2303.15343).
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        dim: int,
        scale: float = 1 / 0.07,
        bias: float | None = None,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.vision = nn.Linear(vision_dim, dim, bias=False)
        self.text = nn.Linear(text_dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.max_scale = max_scale
        nn.init.normal_(self.vision.weight, std=vision_dim**-0.5)
        nn.init.normal_(self.text.weight, std=text_dim**-0.5)


class DualEncoder(Model):
    """CLIP, SigLIP and ALIGN: images and texts are embedded apart and compared by a dot product."""

    def __init__(self, vision: VisionEncoder, text: TextEncoder, heads: type[Heads]) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.heads = heads(vision.dim, text.dim)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and text embeddings (B,E), one row a pair, unit norm."""
        images = self.embed_images(batch.images)[:, 0]  # (U,E)
        return images[batch.slots[:, 0]], self.embed_texts(batch.text["text"])

    def embed_images(self, images: Images) -> Tensor:
        """(U,1,E) of unit norm."""
        features = images.features or self.vision(images)
        pooled = features.pooled  # (U,D)
        if pooled is None:  # towers without a pooler: the mean of their tokens
            parts = features.tokens.split(features.counts.tolist())
            pooled = torch.stack([p.mean(0) for p in parts])
        return F.normalize(self.heads.vision(pooled), dim=-1)[:, None]

    def embed_texts(self, tokens: Tokens) -> Tensor:
        """(B,E) of unit norm."""
        return F.normalize(self.heads.text(self.text(tokens)), dim=-1)

    def processor(self) -> CaptionProcessor:
        """What turns samples into batches of this model."""
        return CaptionProcessor(self.text.encode, ImageLoader(self.vision.transform))

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        self.heads.logit_scale.clamp_(max=math.log(self.heads.max_scale))

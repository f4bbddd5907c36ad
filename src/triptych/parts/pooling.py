"""From the tokens of an image to one vector: what contrastive models compare."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from triptych.parts.vision import VisionEncoder
from triptych.types import ImageFeatures, TriptychError


class ModelPool(nn.Module):
    """The vision tower's own pooled output: class token, average, or SigLIP's attention head."""

    reads = "pooled"

    def __init__(self, vision: VisionEncoder) -> None:
        super().__init__()
        self.dim = vision.pooled_dim

    def forward(self, features: ImageFeatures) -> Tensor:
        return features.pooled  # (U,D)


class TokenPool(nn.Module):
    """The mean of an image's tokens, or the first (the class token under select=cls_patch)."""

    reads = "tokens"

    def __init__(self, vision: VisionEncoder, how: Literal["mean", "first"] = "mean") -> None:
        super().__init__()
        if how not in ("mean", "first"):
            raise TriptychError(f"heads.pool.how is '{how}'; it takes mean or first.")
        if how == "first" and vision.select != "cls_patch":
            raise TriptychError(
                "heads.pool.how=first takes the class token, and vision.select=patch drops it; set "
                "vision.select=cls_patch, or how=mean."
            )
        self.how, self.dim = how, vision.dim

    def forward(self, features: ImageFeatures) -> Tensor:
        tokens, mask = padded(features)  # (U,P,D), (U,P)
        if self.how == "first":
            return tokens[:, 0]
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class AttentionPool(nn.Module):
    """A learned query attends over the tokens, then a residual MLP (the MAP head of
    arXiv 2106.04560, section 3.3, which SigLIP uses)."""

    reads = "tokens"

    def __init__(self, vision: VisionEncoder, heads: int = 4, ratio: int = 4) -> None:
        super().__init__()
        self.dim = dim = vision.dim
        if dim % heads:
            raise TriptychError(f"heads.pool.heads={heads} does not divide the width {dim}.")
        self.query = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )

    def forward(self, features: ImageFeatures) -> Tensor:
        tokens, mask = padded(features)  # (U,P,D), (U,P)
        query = self.query.expand(len(tokens), -1, -1)
        seen = self.attention(query, tokens, tokens, key_padding_mask=~mask, need_weights=False)[0]
        return (seen + self.mlp(self.norm(seen)))[:, 0]  # (U,D)


def padded(features: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Flat tokens as (U,P,D) with a mask (U,P) that is True where there is a token."""
    counts = features.counts
    longest = int(counts.max())
    mask = torch.arange(longest, device=counts.device) < counts[:, None]  # (U,P)
    if bool(mask.all()):
        return features.tokens.view(len(counts), longest, -1), mask
    tokens = features.tokens.new_zeros(len(counts), longest, features.tokens.shape[-1])
    return tokens.masked_scatter(mask[..., None], features.tokens), mask

"""From the tokens of an image to one vector: what contrastive models compare."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
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


class GridPool(nn.Module):
    """Means over the cells of a grid, side by side: what is where decides the place in the vector.

    For towers whose tokens lie on a square grid and do not know their place, such as convolutions.
    cells: a side of the grid; D is cells^2 times the tower's width.
    """

    reads = "tokens"

    def __init__(self, vision: VisionEncoder, cells: int = 3) -> None:
        super().__init__()
        self.side, self.cells = _side(vision), cells
        if not 1 <= cells <= self.side:
            raise TriptychError(f"heads.pool.cells is {cells}; it takes 1 to {self.side} here.")
        self.dim = vision.dim * cells * cells

    def forward(self, features: ImageFeatures) -> Tensor:
        tokens, _ = padded(features)  # (U,P,D)
        grid = tokens.transpose(1, 2).unflatten(2, (self.side, self.side))  # (U,D,h,w)
        return F.adaptive_avg_pool2d(grid, self.cells).flatten(1)  # (U,D*cells*cells)


class AttentionPool(nn.Module):
    """Learned queries attend over the tokens, then a residual MLP (the MAP head of
    arXiv 2106.04560, section 3.3, which SigLIP uses); several queries' outputs stand side by side.
    """

    reads = "tokens"

    def __init__(
        self, vision: VisionEncoder, heads: int = 4, ratio: int = 4, queries: int = 1
    ) -> None:
        super().__init__()
        dim = vision.dim
        if dim % heads:
            raise TriptychError(f"heads.pool.heads={heads} does not divide the width {dim}.")
        self.dim = queries * dim
        self.query = nn.Parameter(torch.randn(1, queries, dim) * dim**-0.5)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )

    def forward(self, features: ImageFeatures) -> Tensor:
        tokens, mask = padded(features)  # (U,P,D), (U,P)
        return self.attend(tokens, mask)

    def attend(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(U,queries*D) from (U,P,D) and a mask (U,P) that is True where there is a token."""
        query = self.query.expand(len(tokens), -1, -1)
        seen = self.attention(query, tokens, tokens, key_padding_mask=~mask, need_weights=False)[0]
        return (seen + self.mlp(self.norm(seen))).flatten(1)


class PlacedAttentionPool(AttentionPool):
    """Attention over normalised tokens with learned places, for towers that have none (CLIP's
    pooling of its ResNets, arXiv 2103.00020, section 2.4)."""

    def __init__(
        self, vision: VisionEncoder, heads: int = 4, ratio: int = 4, queries: int = 1
    ) -> None:
        super().__init__(vision, heads, ratio, queries)
        self.tokens = nn.LayerNorm(vision.dim)
        count = vision.num_tokens(*vision.transform.size)
        self.places = nn.Parameter(torch.randn(count, vision.dim) * vision.dim**-0.5)

    def forward(self, features: ImageFeatures) -> Tensor:
        tokens, mask = padded(features)  # (U,P,D), (U,P)
        return self.attend(self.tokens(tokens) + self.places, mask)


def _side(vision: VisionEncoder) -> int:
    """Tokens on a side of the tower's square grid."""
    count = vision.num_tokens(*vision.transform.size)
    side = math.isqrt(count)
    if side * side != count:
        raise TriptychError(
            f"heads.pool of a grid needs tokens on a square, and this tower gives {count}; set a "
            "square vision.transform.size and vision.select=patch, or another heads.pool."
        )
    return side


def padded(features: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Flat tokens as (U,P,D) with a mask (U,P) that is True where there is a token."""
    counts = features.counts
    longest = int(counts.max())
    mask = torch.arange(longest, device=counts.device) < counts[:, None]  # (U,P)
    if bool(mask.all()):
        return features.tokens.view(len(counts), longest, -1), mask
    tokens = features.tokens.new_zeros(len(counts), longest, features.tokens.shape[-1])
    return tokens.masked_scatter(mask[..., None], features.tokens), mask

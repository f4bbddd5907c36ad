"""Connectors that read the image alone: linear and MLP projections, with or without shuffling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from triptych.types import ImageFeatures, Tokens, TriptychError, VisualTokens


class MLPConnector(nn.Module):
    """Project vision tokens to the language width: `depth` linear layers with GELU between.

    depth 1 is LLaVA's linear projection (arXiv 2304.08485, section 4.1), depth 2 LLaVA-1.5's
    mlp2x_gelu (arXiv 2310.03744, section 3.2). `shuffle` r first folds each r x r square of the
    token grid into one token of r*r times the width (pixel shuffle), so P becomes P / r^2.
    """

    reads_text = False

    def __init__(
        self, vision_dim: int, language_dim: int, depth: int = 2, shuffle: int = 1
    ) -> None:
        super().__init__()
        if depth < 1 or shuffle < 1:
            raise TriptychError("connector.depth and connector.shuffle start at 1.")
        self.shuffle = shuffle
        layers: list[nn.Module] = [nn.Linear(vision_dim * shuffle**2, language_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(language_dim, language_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        tokens, counts = features.tokens, features.counts  # (sum P, D), (U,)
        if self.shuffle > 1:
            tokens = torch.cat([self._fold(t) for t in tokens.split(counts.tolist())])
            counts = counts // self.shuffle**2
        weight = self.layers[0].weight
        return VisualTokens(self.layers(tokens.to(weight.dtype)), counts)  # (sum Q, D)

    def num_tokens(self, n: int) -> int:
        """Q of an image of n vision tokens."""
        side = math.isqrt(n)
        if self.shuffle > 1 and (side * side != n or side % self.shuffle):
            raise TriptychError(
                f"connector.shuffle={self.shuffle} needs a square grid of tokens whose side it "
                f"divides, and the vision encoder gives {n} tokens; use vision.select=patch or "
                "another shuffle."
            )
        return n // self.shuffle**2

    def _fold(self, tokens: Tensor) -> Tensor:
        r, side = self.shuffle, math.isqrt(len(tokens))
        grid = tokens.view(side // r, r, side // r, r, -1)  # (h,r,w,r,D)
        return grid.permute(0, 2, 1, 3, 4).reshape((side // r) ** 2, -1)


class RegionConnector(nn.Module):
    """One linear layer with norm and dropout, from region features to the width of BERT (OSCAR).

    (Oscar `modeling_bert.py`: img_embedding, and its optional norm with `norm_eps`.)
    """

    reads_text = False

    def __init__(
        self, vision_dim: int, language_dim: int, dropout: float = 0.1, norm_eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(vision_dim, language_dim)
        self.norm = nn.LayerNorm(language_dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        tokens = self.proj(features.tokens.to(self.proj.weight.dtype))  # (sum P, D)
        return VisualTokens(self.dropout(self.norm(tokens)), features.counts)

    def num_tokens(self, n: int) -> int:
        """A region stays a token."""
        return n


class StateHead(nn.Module):
    """A BERT pooler and a classifier over one state (B,D): [CLS] says whether tags match."""

    def __init__(self, dim: int, classes: int = 2) -> None:
        super().__init__()
        self.pool, self.classify = nn.Linear(dim, dim), nn.Linear(dim, classes)

    def forward(self, state: Tensor) -> Tensor:
        """(B,classes)"""
        return self.classify(self.pool(state).tanh())

"""The one-layer resampler with 2-D positions: any image becomes a fixed grid of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.types import ImageFeatures, Tokens, TriptychError, VisualTokens


class Resampler(nn.Module):
    """`side`^2 queries cross-attend once to the image; both sides carry 2-D sine positions.

    Qwen-VL, arXiv 2308.12966, section 2.1, and its released `visual.py`: 256 queries, positions
    added to queries and keys but not to values, norms before and after, a square projection.
    """

    reads_text = False
    unused: tuple[str, ...] = ()

    def __init__(
        self, vision_dim: int, language_dim: int, side: int = 16, head_dim: int = 128
    ) -> None:
        super().__init__()
        if language_dim % head_dim or language_dim % 4:
            raise TriptychError(
                f"the language model's width {language_dim} is no multiple of 4 and of "
                f"connector.head_dim={head_dim}; choose a divisor."
            )
        self.side = side
        self.queries = nn.Parameter(torch.empty(side * side, language_dim))
        nn.init.trunc_normal_(self.queries, std=0.02)
        positions = sine_positions(side, side, language_dim)
        self.register_buffer("positions", positions, persistent=False)  # (Q,D)
        same = vision_dim == language_dim
        self.kv_proj = nn.Identity() if same else nn.Linear(vision_dim, language_dim, bias=False)
        self.attn = nn.MultiheadAttention(language_dim, language_dim // head_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(language_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(language_dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(language_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(language_dim, language_dim) * language_dim**-0.5)
        for linear in (self.kv_proj, self.attn.out_proj):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        """side^2 tokens an image: flat (U*Q, D)."""
        images = [self._one(t) for t in features.tokens.split(features.counts.tolist())]
        counts = features.counts.new_full((len(images),), self.side**2)
        return VisualTokens(torch.cat(images), counts)

    def num_tokens(self, n: int) -> int:
        """side^2, for any image."""
        if math.isqrt(n) ** 2 != n:
            raise TriptychError(
                f"the resampler needs a square grid of vision tokens and gets {n}; use "
                "vision.select=patch and a square transform."
            )
        return self.side**2

    def _one(self, tokens: Tensor) -> Tensor:
        """(Q,D) from one image's (P,D)."""
        kv = self.ln_kv(self.kv_proj(tokens.to(self.queries.dtype)))  # (P,D)
        where = self.positions.to(kv.dtype)
        queries = self.ln_q(self.queries) + where
        keys = kv + resized(where, len(tokens))
        mixed, _ = self.attn(queries[None], keys[None], kv[None], need_weights=False)
        return self.ln_post(mixed[0]) @ self.proj


def sine_positions(height: int, width: int, dim: int) -> Tensor:
    """(height*width, dim) fixed positions: half of the width for the column, half for the row.

    Sine and cosine at the frequencies of "Attention is all you need"; the column comes first, as in
    the masked autoencoder's code, whose order Qwen-VL's checkpoints were trained with.
    """
    rates = 1 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = []
    for axis in (column, row):
        angle = axis.flatten()[:, None] * rates  # (H*W, dim/4)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1).float()


def resized(positions: Tensor, count: int) -> Tensor:
    """Square positions (Q,D) as (count,D), by bicubic interpolation where the grids differ."""
    if len(positions) == count:
        return positions
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    grid = positions.view(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)

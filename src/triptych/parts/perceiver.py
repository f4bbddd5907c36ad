"""The Perceiver resampler: latents that read any number of vision tokens (Flamingo)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from triptych.parts.attention import padded
from triptych.types import ImageFeatures, Tokens, VisualTokens


class PerceiverResampler(nn.Module):
    """`queries` latents attend to the image's tokens and themselves, `depth` times.

    Flamingo, arXiv 2204.14198, appendix A.1.1; sizes and layout of open_flamingo `helpers.py`.
    Visual tokens keep the width of the vision encoder: the gated layers that read them project.
    """

    reads_text = False
    unused: tuple[str, ...] = ()
    audit_grace = 8  # stands behind gates that start at 0

    def __init__(
        self,
        vision_dim: int,
        language_dim: int | None = None,
        queries: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.out_dim = vision_dim
        self.latents = nn.Parameter(torch.randn(queries, vision_dim))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": PerceiverAttention(vision_dim, heads, head_dim),
                    "mlp": feed_forward(vision_dim, activation),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(vision_dim)

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        """Q latents an image: flat (U*Q, D) in the width of the vision encoder."""
        states, real = padded(features)  # (U,P,D), (U,P)
        states = states.to(self.latents.dtype)
        hidden = self.latents.expand(len(states), -1, -1)  # (U,Q,D)
        for block in self.blocks:
            hidden = hidden + block["attention"](states, hidden, real)
            hidden = hidden + block["mlp"](hidden)
        counts = torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
        return VisualTokens(self.norm(hidden).flatten(0, 1), counts)

    def num_tokens(self, n: int) -> int:
        """Q, whatever the number of vision tokens."""
        return len(self.latents)


class PerceiverAttention(nn.Module):
    """Latents attend to the image's tokens and to all latents."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_states, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, heads * head_dim, bias=False)
        self.value = nn.Linear(dim, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, states: Tensor, latents: Tensor, real: Tensor | None = None) -> Tensor:
        """(U,Q,D) from (U,P,D) and (U,Q,D); `real` (U,P) says which tokens are no padding."""
        states, latents = self.norm_states(states), self.norm_latents(latents)
        both = torch.cat([states, latents], 1)  # (U,P+Q,D)
        mask = None
        if real is not None:
            mask = torch.cat([real, real.new_ones(latents.shape[:2])], 1)[:, None, None]
        return attend(
            self.query(latents), self.key(both), self.value(both), self.heads, self.out, mask
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    out: nn.Linear,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention (B,L,D) of projected streams; mask (B,1,L,K) True where visible."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(*split, attn_mask=mask)
    return out(mixed.transpose(1, 2).flatten(2))


def feed_forward(dim: int, activation: str = "gelu", factor: int = 4) -> nn.Sequential:
    """Norm, up, activation, down; without biases, as in open_flamingo."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, factor * dim, bias=False),
        ACT2FN[activation],
        nn.Linear(factor * dim, dim, bias=False),
    )

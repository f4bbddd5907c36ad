"""Gated cross-attention: how a frozen decoder learns to look (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from triptych.parts.perceiver import attend, feed_forward


class Media(NamedTuple):
    """What a gated layer may look at: the visual tokens of a row, and which token sees which."""

    visual: Tensor  # (B,M,Q,D) the images of each row, zeros where it has fewer than M
    latest: Tensor  # (B,T) the image each token sees, -1 = none

    def follow(self, hidden: Tensor) -> Media:
        """The same for hidden states (B',t,D) of a generation that goes on behind the prompt.

        Tokens behind the last column see what that column sees; beams repeat their row.
        """
        beams, steps = len(hidden) // len(self.latest), hidden.shape[1]
        latest, visual = self.latest, self.visual
        more = steps - latest.shape[1]
        if more > 0:
            latest = torch.cat([latest, latest[:, -1:].expand(-1, more)], 1)
        elif more < 0:  # with a cache only the newest token is run
            latest = latest[:, -1:].expand(-1, steps)
        if beams > 1:
            latest = latest.repeat_interleave(beams, 0)
            visual = visual.repeat_interleave(beams, 0)
        return Media(visual, latest)


class GatedCrossAttention(nn.Module):
    """A gated cross-attention and a gated feed-forward layer in front of a decoder block.

    Both add tanh(gate) times their output and gates start at 0, so the language model starts
    unchanged (section 3.1.2 and figure 4). A token that has seen no image gets no update from the
    cross-attention; the feed-forward layer serves every token, as in open_flamingo `helpers.py`.
    """

    def __init__(self, dim: int, visual_dim: int, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(visual_dim, heads * head_dim, bias=False)
        self.value = nn.Linear(visual_dim, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.mlp = feed_forward(dim)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, media: Media | None) -> Tensor:
        """(B,T,D) before the decoder block, with what the images add."""
        if media is not None:
            hidden = hidden + self.attention_gate.tanh() * self._look(hidden, media.follow(hidden))
        return hidden + self.mlp_gate.tanh() * self.mlp(hidden)

    def _look(self, hidden: Tensor, media: Media) -> Tensor:
        queries = media.visual.shape[2]
        visual = media.visual.flatten(1, 2)  # (B,M*Q,D)
        owner = torch.arange(media.visual.shape[1], device=hidden.device).repeat_interleave(queries)
        sees = media.latest[:, :, None] == owner  # (B,T,M*Q)
        blind = media.latest[:, :, None] < 0  # (B,T,1); softmax over nothing is not a number
        mixed = attend(
            self.query(self.norm(hidden)),
            self.key(visual),
            self.value(visual),
            self.heads,
            self.out,
            (sees | blind)[:, None],
        )
        return mixed.masked_fill(blind, 0)

"""Who sees whom in a row of several samples: the segment rule as a mask, and as predecessors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from triptych.types import PAD, SHARED, ImageFeatures, Tokens

Attention = Literal["causal", "bidirectional"]


def visible(tokens: Tokens, attention: Attention) -> Tensor:
    """(B,T,T) True where a query (row) may attend to a key (column).

    A token sees its own segment and the row's shared prefix; no sample sees another. Causal rows
    also look only backwards, and a prefix never looks into a segment.
    """
    query, key = tokens.segments[:, :, None], tokens.segments[:, None, :]
    seen = ((query == key) | (key == SHARED)) & (key != PAD) & (query != PAD)
    if attention == "causal":
        length = tokens.ids.shape[1]
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    # a padding query sees itself, so that its softmax is defined
    return seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)


def additive_mask(tokens: Tokens, attention: Attention, dtype: torch.dtype) -> Tensor:
    """(B,1,T,T) 0 where visible and the smallest number elsewhere, as the library models take."""
    seen = visible(tokens, attention)[:, None]
    return additive(seen, dtype)


def predecessors(tokens: Tokens) -> Tensor:
    """(B,T) index of the token that precedes each in its own sample, -1 where there is none.

    The first token of a segment follows the last of the shared prefix, wherever it stands.
    """
    segments = tokens.segments
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    before = torch.where(segments == SHARED, index, -1).amax(1, keepdim=True)  # (B,1)
    same = torch.zeros_like(segments, dtype=torch.bool)
    same[:, 1:] = segments[:, 1:] == segments[:, :-1]
    first = torch.where(segments > 0, before.expand_as(segments), -1)
    return torch.where(segments == PAD, -1, torch.where(same, index - 1, first))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True and the smallest number elsewhere; a mask that eager and sdpa both take."""
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, torch.finfo(dtype).min)


def padded(features: ImageFeatures) -> tuple[Tensor, Tensor | None]:
    """Flat vision tokens (sum P, D) as (U,P,D), and (U,P) which are real; None if all are."""
    counts = features.counts
    images, longest = len(counts), int(counts.max())
    if len(features.tokens) == images * longest:
        return features.tokens.view(images, longest, -1), None
    real = torch.arange(longest, device=counts.device) < counts[:, None]  # (U,P)
    states = features.tokens.new_zeros(images, longest, features.tokens.shape[-1])
    states[real] = features.tokens
    return states, real

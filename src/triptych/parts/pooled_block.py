"""The last block of a tower that is read at one token: keys and values of all, the rest of one.

A CLIP tower is pooled at its class or end token, so its last block computes queries, output and MLP
for that token alone. Same embeddings and gradients; other tokens come out as zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("CLIPEncoderLayer", "SiglipEncoderLayer")  # pre-norm blocks with these attribute names


def enable(blocks: nn.ModuleList | None) -> bool:
    """Let the last block take `read`; False if it is of another build."""
    if not blocks or type(blocks[-1]).__name__ not in KINDS:
        return False
    if blocks[-1].self_attn.config._attn_implementation != "sdpa":
        return False
    blocks[-1].forward = partial(_one_token, blocks[-1])
    return True


def _one_token(
    block: nn.Module,
    hidden: Tensor,  # (B,T,D)
    mask: Tensor | None = None,
    *args: Any,
    read: Tensor | None = None,  # (B,) the token that is read; None = all
    **kwargs: Any,
) -> Tensor:
    attention = block.self_attn
    if read is None or (attention.training and attention.dropout):
        return type(block).forward(block, hidden, mask, *args, **kwargs)
    rows = torch.arange(len(hidden), device=hidden.device)
    normed, heads = block.layer_norm1(hidden), attention.num_heads
    query = attention.q_proj(normed[rows, read])[:, None]  # (B,1,D)
    query, key, value = (
        states.unflatten(-1, (heads, -1)).transpose(1, 2)
        for states in (query, attention.k_proj(normed), attention.v_proj(normed))
    )
    if mask is not None:
        seen = mask.expand(len(hidden), -1, -1, -1)[rows, :, read][:, :, None]  # (B,1,1,T)
    elif kwargs.get("is_causal"):
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        seen = (columns <= read[:, None])[:, None, None]
    else:
        seen = None
    scale = attention.scale
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    states = hidden[rows, read] + attention.out_proj(out.transpose(1, 2).flatten(1))  # (B,D)
    states = states + block.mlp(block.layer_norm2(states))
    return hidden.new_zeros(hidden.shape).index_put((rows, read), states)

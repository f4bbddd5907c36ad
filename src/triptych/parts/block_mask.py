"""Who sees whom among tokens laid behind each other, for GPUs: one fused call of FlexAttention.

Blocks of the score matrix that no query looks at are skipped, so samples and rows do not pay for
each other, however many they are. The kernel is compiled for NVIDIA GPUs of compute capability 8
and later; its backward pass exists nowhere else. No GPU was at hand: the masks and the forward
pass are proven against `visible` on a CPU, the kernel itself was not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triptych.types import SHARED, Tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SMALLEST_HEAD = 16  # what the kernel's matrix products take
DROPOUTS = ("attention_dropout", "attn_pdrop")  # which the kernel does not have


def suits(config: Any, device: torch.device) -> bool:
    """Whether this decoder's attention runs as such a kernel on this device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    drops = any(getattr(config, name, 0) for name in DROPOUTS)
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return modern and head >= SMALLEST_HEAD and not drops


@dataclass(frozen=True)
class Blocks:
    """Q queries among N tokens, each seeing its sample and its row's prefix up to itself."""

    rows: Tensor  # (N,) of the batch
    segments: Tensor  # (N,)
    mask: BlockMask

    @classmethod
    def of(cls, tokens: Tokens) -> Blocks:
        """Over the N real tokens of (B,T), a query each."""
        real = tokens.mask
        numbers = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        rows, segments = numbers[real], tokens.segments[real]
        return cls._of(rows, segments, torch.arange(len(rows), device=rows.device))

    def at(self, read: Tensor) -> Blocks:
        """The same for the queries (R,) alone."""
        return self._of(self.rows, self.segments, read)

    @classmethod
    def _of(cls, rows: Tensor, segments: Tensor, queries: Tensor) -> Blocks:
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = queries[query]
            together = (segments[key] == segments[own]) | (segments[key] == SHARED)
            return (key <= own) & (rows[key] == rows[own]) & together

        gpu = rows.is_cuda  # compiled, (Q,N) never exists as a whole
        sizes = (None, None, len(queries), len(rows))
        mask = create_block_mask(seen, *sizes, device=str(rows.device), _compile=gpu)
        return cls(rows, segments, mask)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # (1,heads,Q,d)
        key: Tensor,  # (1,heads or fewer,N,d)
        value: Tensor,
        scaling: float | None,
        dropout: float,
    ) -> Tensor:
        """(1,Q,heads,d)."""
        from transformers.integrations.flex_attention import flex_attention_forward

        # rotary positions leave queries and keys in float32 under autocast; the kernel takes one
        # type, the one that fused attention would cast to
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(
            module, query, key, value, self.mask, scaling=scaling, dropout=dropout
        )[0]

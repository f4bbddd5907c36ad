"""Rows without their padding: a decoder's blocks run on real tokens only.

The rows of a batch are laid behind each other as one, so that padding costs no matrix product;
attention goes row by row, or on a GPU in one call over a block mask. The last block computes
queries, output and MLP only where a state is read; its keys and values stand for all tokens. Both
leave the numbers as they are, for any decoder of the library whose attention goes through its
interface and that takes a cache: no class of it is named here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.parts import block_mask
from triptych.parts.attention import visible
from triptych.types import SHARED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "triptych_rows"
GPU_FULL = 0.8  # share of real tokens above which a GPU keeps the batch whole (not measured)
CALL = 4000  # what one more call of attention costs, in pairs of query and key
READ = 0.5  # the last block looks at single positions if no more than this share of them is read


@dataclass(frozen=True)
class Part:
    """Queries that stand together, one part behind the other, and the keys they look at."""

    length: int  # queries
    keys: tuple[int, ...]  # numbers of pieces: the own one, or the prefix and the own one
    mask: Tensor | None  # (q,k) True where visible; None = causal over the own piece


class Pattern(Protocol):
    """How tokens that lie behind each other attend."""

    def at(self, read: Tensor) -> Pattern:
        """The same for the queries (R,) alone, in ascending order."""

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


@dataclass(frozen=True)
class Pieces:
    """A pattern of calls: keys in pieces of these lengths, queries in parts.

    Tensors are split once and not sliced, whose backward pass would fill N zeros for each slice.
    """

    lengths: tuple[int, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, tokens: Tokens) -> Pieces:
        """Over the N real tokens of (B,T), a query each."""
        parts: list[Part] = []
        for real, segments in zip(tokens.mask, tokens.segments, strict=True):
            own = segments[real]  # (length,)
            if len(own):
                parts += _row_parts(own, len(parts))
        return cls(tuple(part.length for part in parts), tuple(parts))

    def at(self, read: Tensor) -> Pieces:
        return Pieces(self.lengths, _reading(self.parts, read))

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        dropout: float,
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        keys, values = key.split(self.lengths, 2), value.split(self.lengths, 2)
        queries = query.split([part.length for part in self.parts], 2)
        found = [
            F.scaled_dot_product_attention(
                own,
                _join(keys, part.keys),
                _join(values, part.keys),
                attn_mask=part.mask,
                dropout_p=dropout,
                is_causal=part.mask is None,
                scale=scaling,
            )
            for own, part in zip(queries, self.parts, strict=True)
        ]
        out = found[0] if len(found) == 1 else torch.cat(found, 2)
        return out.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class FlatRows:
    """The N real tokens of a batch as one row, and which of them are read."""

    places: Tensor  # (N,) of the real tokens in (B*T)
    pattern: Pattern
    read: Tensor | None = None  # (R,) among the N; None = all
    reading: Pattern | None = None  # of the R alone, over the keys of all

    @classmethod
    def of(cls, tokens: Tokens, scored: Tensor | None, config: Any) -> FlatRows:
        """From (B,T) tokens of a decoder; scored: (B,T) True where a state will be read."""
        fused = block_mask.suits(config, tokens.ids.device)
        pattern: Pattern = block_mask.Blocks.of(tokens) if fused else Pieces.of(tokens)
        places = tokens.mask.flatten().nonzero()[:, 0]
        if scored is None:
            return cls(places, pattern)
        read = scored.flatten()[places].nonzero()[:, 0]
        if len(read) > READ * len(places) or not len(read):
            return cls(places, pattern)
        return cls(places, pattern, read, pattern.at(read))


def _plain(segments: Tensor) -> bool:
    """Whether a row is one sample, alone or behind its prefix: causal without exceptions."""
    return int(segments.max()) == int(segments[-1]) and len(segments[segments > 0].unique()) <= 1


def _row_parts(segments: Tensor, first: int) -> list[Part]:
    """A row at once under its mask, or prefix and samples apart, whichever is less work.

    The mask costs T x T; apart, samples do not pay for each other, but each is a call of its own.
    first: the number of the row's first piece.
    """
    if _plain(segments):
        return [Part(len(segments), (first,), None)]
    values, counts = segments.unique_consecutive(return_counts=True)
    lengths = counts.tolist()
    shared = lengths[0] if int(values[0]) == SHARED else 0
    samples = lengths[1:] if shared else lengths
    apart = shared**2 + sum(n * (shared + n) for n in samples) + CALL * len(lengths)
    if len(values.unique()) < len(values) or apart > len(segments) ** 2:
        row = segments[None]
        return [Part(len(segments), (first,), visible(Tokens(row, row, row), "causal")[0])]
    if not shared:
        return [Part(length, (first + i,), None) for i, length in enumerate(samples)]
    parts = [Part(shared, (first,), None)]
    for number, length in enumerate(samples, start=first + 1):
        mask = torch.ones(length, shared + length, dtype=torch.bool, device=segments.device)
        parts.append(Part(length, (first, number), mask.tril(shared)))
    return parts


def _reading(parts: Sequence[Part], read: Tensor) -> tuple[Part, ...]:
    """The same parts with only the queries that are read; `read` is in ascending order."""
    found, start, at = [], 0, 0
    bounds = torch.tensor([p.length for p in parts], device=read.device).cumsum(0)
    for part, stop in zip(parts, torch.searchsorted(read, bounds).tolist(), strict=True):
        if stop > at:
            inside = read[at:stop] - start  # (r,)
            if part.mask is not None:
                mask = part.mask[inside]
            else:
                mask = torch.arange(part.length, device=read.device) <= inside[:, None]
            found.append(Part(stop - at, part.keys, mask))
        start, at = start + part.length, stop
    return tuple(found)


def attend(
    module: nn.Module,
    query: Tensor,  # (1,heads,N,d), or (B,heads,T,d) without rows
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: Pattern | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: by the pattern of rows if there is one, else the library's own."""
    if rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return rows.attend(module, query, key, value, scaling, dropout), None


def _join(pieces: tuple[Tensor, ...], numbers: tuple[int, ...]) -> Tensor:
    chosen = [pieces[number] for number in numbers]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 2)


def enable(model: PreTrainedModel, last: nn.Module) -> bool:
    """Let a decoder take rows; False where its attention has rules that rows do not carry."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    biased = getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
    fused = config._attn_implementation == "sdpa"
    through = getattr(type(model), "_supports_attention_backend", False)
    known = kinds <= {"full_attention", "sliding_attention"}
    if capped or biased or not (fused and through and known):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    last.forward = partial(_last_block, last)
    return True


def fits(config: Any, tokens: Tokens) -> bool:
    """Whether rows lie within the decoder's attention window, and are worth taking apart.

    A GPU without the fused kernel attends to a full batch in one call; there rows pay only where
    much of it is padding.
    """
    one_by_one = tokens.ids.is_cuda and not block_mask.suits(config, tokens.ids.device)
    if one_by_one and int(tokens.mask.sum()) > GPU_FULL * tokens.ids.numel():
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or int(tokens.positions.max()) < window


class _Found(Exception):
    """Keys and values of a block, thrown from inside it before it attends."""


class _Catch:
    """Stands in for a cache: takes what a block would store, and ends the call."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Found(key, value)

    def get_seq_length(self, *args: Any) -> int:
        return 0


class _Lend(_Catch):
    """Stands in for a cache that holds the keys and values of all tokens."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.key, self.value


def _last_block(
    block: nn.Module, hidden: Tensor, *args: Any, read: FlatRows | None = None, **kwargs: Any
) -> Any:
    """The last block; with `read`, states of other positions are zero in what it returns.

    First it runs up to its keys and values, then on the positions that are read alone. Where it
    recomputes activations the library drops caches, so it runs in full.
    """
    forward = type(block).forward
    recomputed = getattr(block, "gradient_checkpointing", False) and block.training
    if read is None or read.read is None or recomputed:
        return forward(block, hidden, *args, **kwargs)
    names = list(signature(forward).parameters)[2:]  # behind self and the states
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = "layer_past" if "layer_past" in names else "past_key_values"  # GPT-NeoX names it so
    try:
        return forward(block, hidden, **{**kwargs, cache: _Catch()})
    except _Found as found:
        lent = _Lend(*found.args)
    chosen = {n: _at(v, read.read) for n, v in kwargs.items() if n.startswith("position")}
    more = {**kwargs, **chosen, cache: lent, "rows": read.reading}
    out = forward(block, hidden[:, read.read], **more)
    states = out[0] if isinstance(out, tuple) else out  # (1,R,D)
    whole = states.new_zeros(hidden.shape).index_copy(1, read.read, states)
    return (whole, *out[1:]) if isinstance(out, tuple) else whole


def _at(value: Any, read: Tensor) -> Any:
    """Positions, or cosines and sines of positions (1,N,...), at the tokens that are read."""
    if isinstance(value, tuple):
        return tuple(_at(v, read) for v in value)
    return value[:, read] if isinstance(value, Tensor) else value


__all__ = ["FlatRows", "Pieces", "attend", "enable", "fits"]

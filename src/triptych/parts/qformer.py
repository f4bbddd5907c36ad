"""The Q-Former: learned queries that read an image, alone or beside a text (arXiv 2301.12597)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triptych.parts.attention import additive, padded
from triptych.parts.pair_text import PairText
from triptych.parts.pretrained import load_model, load_part
from triptych.types import ImageFeatures, Tokens, TriptychError, VisualTokens


class QFormer(nn.Module):
    """Queries cross-attend to the image in every second layer and become Q visual tokens.

    Wraps the library's Blip2QFormerModel. `norm` is BLIP-2's ln_vision, `proj` the linear layer to
    the language width (none in stage 1, which has no language model). config: fields of
    Blip2QFormerConfig; its defaults are BERT-base. reader: tokenizer, starts and max_length of the
    text branch. weights: a run or folder of an earlier stage, whose projection may be missing.
    (Section 3.1 and LAVIS `blip2.py`.)
    """

    reads_text = False
    text_layers = False  # whether the layers hold a feed-forward network for text tokens
    unused: tuple[str, ...] = ()

    def __init__(
        self,
        vision_dim: int,
        language_dim: int | None = None,
        queries: int = 32,
        config: dict[str, Any] | None = None,
        norm_eps: float = 1e-5,
        implementation: str = "sdpa",
        reader: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        fields = dict(config or {})
        fields |= {"encoder_hidden_size": vision_dim, "use_qformer_text_input": self.text_layers}
        self.config = Blip2QFormerConfig(**fields)
        self.dim, spread = self.config.hidden_size, self.config.initializer_range
        self.norm = nn.LayerNorm(vision_dim, eps=norm_eps)
        self.queries = nn.Parameter(torch.empty(1, queries, self.dim).normal_(std=spread))
        self.qformer = load_model(Blip2QFormerModel, self.config, None, attention=implementation)
        self.proj = None if language_dim is None else nn.Linear(self.dim, language_dim)
        self._add_text(**(reader or {}))
        if weights is not None:
            load_part(self, weights, optional=("proj.",))

    def _add_text(self) -> None:
        """What a Q-Former that reads text adds; this one does not."""

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        """Q tokens an image in the language width: flat (U*Q, D)."""
        hidden = self.proj(self.look(*padded(features)))  # (U,Q,D)
        counts = torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
        return VisualTokens(hidden.flatten(0, 1), counts)

    def num_tokens(self, n: int) -> int:
        """Q, whatever the number of vision tokens."""
        return self.queries.shape[1]

    def look(self, states: Tensor, real: Tensor | None) -> Tensor:
        """Query states (U,Q,D) after reading images (U,P,D) alone."""
        queries = self.queries.expand(len(states), -1, -1)
        return self._run(queries, states=states, real=real)

    def _run(
        self,
        embeds: Tensor,
        seen: Tensor | None = None,
        states: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """(B,L,D) of a stream of queries and text; `seen` (B,L,L) is who attends to whom.

        Without `states` there are no queries in the stream and it reads text alone.
        """
        weight = self.norm.weight
        image = None if states is None else self.norm(states.to(weight.dtype))
        image_mask = None if real is None else additive(real[:, None, None], weight.dtype)
        return self.qformer(
            query_embeds=embeds,
            query_length=0 if states is None else self.queries.shape[1],
            attention_mask=None if seen is None else additive(seen[:, None], weight.dtype),
            encoder_hidden_states=image,
            encoder_attention_mask=image_mask,
        ).last_hidden_state


class TextQFormer(QFormer, PairText):
    """A Q-Former with its text branch: word and position embeddings and own feed-forward layers."""

    text_layers = True

    def _add_text(
        self,
        tokenizer: str | None = None,
        starts: dict[str, str] | None = None,
        max_length: int = 32,
    ) -> None:
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        self.embeddings = Blip2TextEmbeddings(self.config)
        # alone, the library's class starts at N(0,1), which makes the first LM loss 21, not ln V
        for table in (self.embeddings.word_embeddings, self.embeddings.position_embeddings):
            nn.init.normal_(table.weight, std=self.config.initializer_range)
        vocabulary = self.config.vocab_size
        self.set_tokenizer(tokenizer, starts, vocabulary, max_length)

    def ground(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """Query states (B,Q,D) after reading image and text together (bi-directional mask)."""
        seen = bidirectional(tokens, self.queries.shape[1])
        return self._both(states, real, tokens, seen)[:, : self.queries.shape[1]]

    def _both(self, states: Tensor, real: Tensor | None, tokens: Tokens, seen: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens.ids), -1, -1)
        embeds = self.embeddings(tokens.ids, tokens.positions, queries)  # (B,Q+T,D)
        return self._run(embeds, seen, states, real)


class InstructQFormer(TextQFormer):
    """The Q-Former that also reads the instruction (InstructBLIP, arXiv 2305.06500, sec. 2.3)."""

    reads_text = True

    def _add_text(self, **reader: Any) -> None:
        super()._add_text(**reader)
        # what the last layer writes at text tokens is never read
        last = f"qformer.encoder.layer.{self.config.num_hidden_layers - 1}"
        self.unused = (f"{last}.intermediate", f"{last}.output")

    def forward(self, features: ImageFeatures, text: Tokens | None = None) -> VisualTokens:
        """features and text have one entry a slot; the visual tokens depend on both."""
        if text is None or len(text.ids) != len(features.counts):
            raise TriptychError(
                "this Q-Former reads the instruction beside each image and the batch brings none; "
                "use the processor of the model that holds it."
            )
        hidden = self.proj(self.ground(*padded(features), text))  # (S,Q,D)
        counts = torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
        return VisualTokens(hidden.flatten(0, 1), counts)


class PairQFormer(TextQFormer):
    """The Q-Former of stage 1: embeds, matches and describes images by its three masks (fig. 2)."""

    def _add_text(self, **reader: Any) -> None:
        super()._add_text(**reader)
        from transformers.models.bert.modeling_bert import BertLMPredictionHead

        self.image_dim = self.dim
        self.lm = BertLMPredictionHead(self.config)
        self.lm.decoder.weight = self.embeddings.word_embeddings.weight
        self.lm.bias = self.lm.decoder.bias
        nn.init.normal_(self.lm.transform.dense.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.lm.transform.dense.bias)
        nn.init.zeros_(self.lm.decoder.bias)

    @property
    def head(self) -> nn.Module:
        return self.lm.decoder

    def read(self, tokens: Tokens) -> Tensor:
        """(B,D) of texts alone: the first token's state (uni-modal mask)."""
        embeds = self.embeddings(tokens.ids, tokens.positions)  # (B,T,D)
        seen = tokens.mask[:, None, :].expand(-1, tokens.ids.shape[1], -1)
        return self._run(embeds, seen)[:, 0]

    def decode(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """(B,T,D) of texts that see the queries and their own past (multi-modal causal mask)."""
        count = self.queries.shape[1]
        return self._both(states, real, tokens, causal(tokens, count))[:, count:]

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D)."""
        return self.lm(hidden)

    def generate(
        self, states: Tensor, real: Tensor | None, tokens: Tokens, max_new_tokens: int = 30
    ) -> Tensor:
        """(B,new) ids written after left-padded beginnings (B,T), greedily, until the end token."""
        written: list[Tensor] = []
        done = torch.zeros(len(tokens.ids), dtype=torch.bool, device=tokens.ids.device)
        for _ in range(max_new_tokens):
            hidden = self.decode(states, real, tokens)[:, -1]
            following = (
                self.logits(hidden).argmax(-1).masked_fill(done, self.tokenizer.pad_token_id)
            )
            written.append(following)
            done = done | (following == self.end_id)
            if done.all():
                break
            tokens = _append(tokens, following)
        return torch.stack(written, 1)


def bidirectional(tokens: Tokens, queries: int) -> Tensor:
    """(B,Q+T,Q+T) queries and text see each other (matching)."""
    keys = _with_queries(tokens.mask, queries)
    return keys[:, None, :].expand(-1, keys.shape[1], -1)


def causal(tokens: Tokens, queries: int) -> Tensor:
    """(B,Q+T,Q+T) queries see queries; text sees queries and what precedes it (describing)."""
    seen = bidirectional(tokens, queries).clone()
    length = tokens.ids.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    seen[:, queries:, queries:] &= past
    seen[:, :queries, queries:] = False
    return seen


def _with_queries(mask: Tensor, queries: int) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), queries), mask], 1)


def _append(tokens: Tokens, ids: Tensor) -> Tokens:
    return Tokens(
        torch.cat([tokens.ids, ids[:, None]], 1),
        torch.cat([tokens.positions, tokens.positions[:, -1:] + 1], 1),
        torch.cat([tokens.segments, torch.ones_like(ids)[:, None]], 1),
    )

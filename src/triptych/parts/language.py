"""Language models: any causal Hugging Face decoder behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triptych.parts import flat_rows
from triptych.parts.attention import additive_mask
from triptych.parts.pretrained import load_model, origin, read_config, resolve
from triptych.types import SHARED, Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class LanguageModel(nn.Module):
    """A causal decoder: embeddings in, hidden states out; its head is called apart.

    `template` is a chat template (a .jinja file or its text) for tokenizers that bring none.
    """

    attention = "causal"
    auto = "AutoModelForCausalLM"

    def __init__(
        self,
        weights: str | None = None,
        config: dict | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        implementation: str = "sdpa",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        import transformers

        self.config = read_config(config, weights, "text_config")
        auto = getattr(transformers, self.auto)
        self.model = load_model(auto, self.config, weights, revision, implementation, dtype)
        self._flat = flat_rows.enable(self.model, self.blocks[-1])
        self._tokenizer, self._template, self._revision = tokenizer or weights, template, revision
        self.unused: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """D, the width of an input embedding."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template; a pad token is added by name if it lacks one."""
        return load_tokenizer(self._tokenizer, self._template, self._revision)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks in order."""
        lists = [m for m in self.model.base_model.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a folder or hub id to take a tokenizer from."""
        return self._tokenizer is not None

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def embed(self, tokens: Tokens) -> Tensor:
        """(B,T,D); placeholder ids (below 0) embed as token 0 and are overwritten by the fusion."""
        return self.model.get_input_embeddings()(tokens.ids.clamp_min(0))

    def forward(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        decoder: Tokens | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B,T,D) after the final norm; segments never see each other.

        media: what a gated fusion shows to the blocks it is attached to. scored: (B,T) True where
        states are read; elsewhere they need not be computed and mean nothing.
        """
        if self._flat and media is None and flat_rows.fits(self.config, tokens):
            return self._without_padding(embeds, tokens, scored)
        return self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=additive_mask(tokens, self.attention, embeds.dtype),
            position_ids=tokens.positions,
            use_cache=False,
            **({} if media is None else {"media": media}),
        ).last_hidden_state

    def _without_padding(self, embeds: Tensor, tokens: Tokens, scored: Tensor | None) -> Tensor:
        """The same over the real tokens alone, laid behind each other as one row (1,N,D)."""
        rows = flat_rows.FlatRows.of(tokens, scored, self.config)
        hidden = self.model.base_model(
            inputs_embeds=embeds.flatten(0, 1)[rows.places][None],
            attention_mask=embeds.new_zeros(1, 1, 1, 1),  # taken as finished; rows stand for it
            position_ids=tokens.positions.flatten()[rows.places][None],
            use_cache=False,
            rows=rows.pattern,
            read=rows,
        ).last_hidden_state[0]  # (N,D)
        whole = hidden.new_zeros(tokens.ids.numel(), hidden.shape[-1])
        return whole.index_copy(0, rows.places, hidden).view(*tokens.ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D): the head with the scale and cap its config states."""
        return finish_logits(self.head(hidden), self.config)

    def generate(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        first: Tensor | None = None,
        **decoding: Any,
    ) -> Tensor:
        """(B,new) token ids after left-padded prompts (B,T,D); greedy unless told otherwise.

        first: (B,) for each row the first row that begins with the same shared prefix. Each such
        prefix is read once and its keys and values are lent to the rows (not where blocks look
        at media, which are bound to whole rows).
        """
        cache = None
        if media is None and first is not None and bool((tokens.segments == SHARED).any()):
            copies = max(decoding.get("num_beams", 1), decoding.get("num_return_sequences", 1))
            cache = self._read_prefixes(embeds, tokens, first)
            cache.batch_repeat_interleave(copies)  # beams of a row stand next to each other
        settings = {"do_sample": False, "max_new_tokens": 32, **decoding}
        with self._showing(media):
            return self.model.generate(
                inputs_embeds=embeds,
                attention_mask=tokens.mask.long(),
                past_key_values=cache,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.stop_ids,
                **settings,
            )

    @contextmanager
    def _showing(self, media: Any) -> Iterator[None]:
        """Bind media to the model's forward for a call: generate refuses arguments of our own."""
        if media is None:
            yield
            return
        forward = self.model.forward

        @wraps(forward)  # generate reads the signature
        def seeing(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, media=media, **kwargs)

        self.model.forward = seeing
        try:
            yield
        finally:
            del self.model.forward

    def _read_prefixes(self, embeds: Tensor, tokens: Tokens, first: Tensor) -> Any:
        """A cache of B rows over the columns of the shared prefixes, each computed once."""
        width = int((tokens.segments == SHARED).any(0).nonzero().amax()) + 1
        from triptych.parts.roomy_cache import with_room

        rows, lent = first.unique(return_inverse=True)
        cache = self.model.base_model(
            inputs_embeds=embeds[rows, :width],
            attention_mask=tokens.mask[rows, :width].long(),
            position_ids=tokens.positions[rows, :width],
            use_cache=True,
        ).past_key_values
        cache.batch_select_indices(lent)
        return with_room(cache)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's, and those the checkpoint generates with."""
        stated = self.model.generation_config.eos_token_id
        listed = stated if isinstance(stated, list) else [stated]
        return sorted({i for i in [self.tokenizer.eos_token_id, *listed] if i is not None})


def finish_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What a decoder does to the output of its head, as its config states it."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else torch.tanh(logits / cap) * cap


def load_tokenizer(
    source: str | None, template: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """A fast tokenizer that can pad and has a chat template; otherwise a sentence says which."""
    from transformers import AutoTokenizer

    if source is None:
        raise TriptychError(
            "language.tokenizer is not set and there are no language.weights to take it from; "
            "name a tokenizer folder or hub id."
        )
    tokenizer = AutoTokenizer.from_pretrained(
        **origin(source), revision=revision or "main", trust_remote_code=False
    )
    if template is not None:
        path = Path(resolve(template))
        tokenizer.chat_template = path.read_text() if path.suffix == ".jinja" else template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer

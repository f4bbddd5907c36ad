"""Masked language models: BERT as one stream of words, tags and regions (OSCAR)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from triptych.parts.attention import additive_mask
from triptych.parts.language import LanguageModel, load_tokenizer
from triptych.types import Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskedLanguageModel(LanguageModel):
    """A BERT whose stream may hold visual tokens: they join behind the embeddings' norm.

    A word gets position, type and norm, a region does not (Oscar `modeling_bert.py`).
    """

    attention = "bidirectional"
    auto = "AutoModelForMaskedLM"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; a mask token is added by name if it lacks one."""
        tokenizer = load_tokenizer(self._tokenizer, self._template, self._revision)
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        if len(tokenizer) > self.config.vocab_size:
            raise TriptychError(
                f"the tokenizer has {len(tokenizer)} tokens with its mask and "
                f"language.config.vocab_size is {self.config.vocab_size}; make it as large."
            )
        return tokenizer

    @property
    def unused(self) -> tuple[str, ...]:
        """Nothing, unless the checkpoint brings a pooler of its own."""
        return ("model.bert.pooler",) if getattr(self.model.base_model, "pooler", None) else ()

    @unused.setter
    def unused(self, names: tuple[str, ...]) -> None:
        """Read from the model instead."""

    def embed(self, tokens: Tokens) -> Tensor:
        """(B,T,D) words with position, type and norm; placeholders are overwritten later."""
        return self.model.base_model.embeddings(
            input_ids=tokens.ids.clamp_min(0),
            token_type_ids=tokens.ids.new_zeros(tokens.ids.shape)
            if tokens.types is None
            else tokens.types,
            position_ids=tokens.positions,
        )

    def forward(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        decoder: Tokens | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B,T,D); every token of a segment sees all others."""
        return self.model.base_model.encoder(
            embeds, attention_mask=additive_mask(tokens, self.attention, embeds.dtype)
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D) by the masked-token head."""
        return self.model.cls(hidden)

    def generate(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        first: Tensor | None = None,
        **decoding: Any,
    ) -> Tensor:
        """(B,blanks) most likely token of each mask, all filled at once."""
        masks = tokens.ids == self.tokenizer.mask_token_id
        blanks = int(masks.sum(1).amax())
        if bool((masks.sum(1) != blanks).any()):
            raise TriptychError("the rows of a batch to fill have different numbers of masks.")
        hidden = self.forward(embeds, tokens)[masks]  # (B*blanks,D)
        return self.logits(hidden).argmax(-1).view(-1, blanks)

"""Language models with an encoder and a decoder: FlanT5 behind the same interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.parts.language import LanguageModel
from triptych.types import Tokens


class Seq2SeqModel(LanguageModel):
    """Visual and prompt tokens go to the encoder, the answer is written by the decoder.

    BLIP-2's prefix language modelling (arXiv 2301.12597, section 3.2): rows of role `language` are
    the encoder's, rows of role `decoder` begin with the start token and hold the labels.
    """

    attention = "seq2seq"
    auto = "AutoModelForSeq2SeqLM"

    @property
    def start_id(self) -> int:
        """The id every decoder row begins with."""
        return self.config.decoder_start_token_id

    def forward(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        decoder: Tokens | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Decoder states (B,T,D) after its final norm."""
        read = self.model.get_encoder()(
            inputs_embeds=embeds, attention_mask=tokens.mask.long()
        ).last_hidden_state
        return self.model.get_decoder()(
            input_ids=decoder.ids,
            attention_mask=decoder.mask.long(),
            encoder_hidden_states=read,
            encoder_attention_mask=tokens.mask.long(),
            use_cache=False,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D); T5 with tied embeddings scales before its head."""
        if getattr(self.config, "scale_decoder_outputs", False):
            hidden = hidden * self.config.d_model**-0.5
        return self.head(hidden)

    def generate(
        self,
        embeds: Tensor,
        tokens: Tokens,
        media: Any = None,
        first: Tensor | None = None,
        **decoding: Any,
    ) -> Tensor:
        """(B,new) ids without the start token."""
        return super().generate(embeds, tokens, media, None, **decoding)[:, 1:]

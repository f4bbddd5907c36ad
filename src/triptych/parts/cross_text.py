"""BERT with image cross-attention in three modes: read, match, write (BLIP, arXiv 2201.12086)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triptych.parts.pair_text import PairText
from triptych.parts.pretrained import load_model
from triptych.types import Tokens, TriptychError


class CrossText(nn.Module, PairText):
    """BLIP's mixture of encoder and decoder over the library's BlipTextModel.

    The decoder shares embeddings, cross-attention and feed-forward layers with the encoder and has
    self-attention of its own (section 3.2, and `tie_encoder_decoder_weights` in BLIP's
    `blip_pretrain.py`). `norm` is the vision tower's final norm. config: fields of BlipTextConfig;
    the defaults are BERT-base. starts: [ENC] begins a text beside an image, [DEC] one to write.
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int | None = None,
        config: dict[str, Any] | None = None,
        norm_eps: float = 1e-5,
        tokenizer: str | None = None,
        starts: dict[str, str] | None = None,
        max_length: int = 30,
    ) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel
        from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

        fields = dict(config or {}) | {"encoder_hidden_size": vision_dim, "is_decoder": True}
        self.config = BlipTextConfig(**fields)
        self.image_dim, self.dim = vision_dim, self.config.hidden_size
        self.norm = nn.LayerNorm(vision_dim, eps=norm_eps)
        # the library's text model has no fused attention
        self.encoder = load_model(BlipTextModel, self.config, None, attention="eager")
        self.encoder.pooler = None
        self.decoder = load_model(BlipTextLMHeadModel, self.config, None, attention="eager")
        self._share()
        predictions = self.decoder.cls.predictions
        predictions.decoder.weight = self.decoder.bert.embeddings.word_embeddings.weight
        predictions.bias = predictions.decoder.bias
        self.set_tokenizer(tokenizer, starts, self.config.vocab_size, max_length)

    def _share(self) -> None:
        own, shared = self.decoder.bert, self.encoder
        own.embeddings = shared.embeddings
        for mine, theirs in zip(own.encoder.layer, shared.encoder.layer, strict=True):
            mine.crossattention = theirs.crossattention
            mine.intermediate, mine.output = theirs.intermediate, theirs.output

    @property
    def head(self) -> nn.Module:
        return self.decoder.cls.predictions.decoder

    def look(self, states: Tensor, real: Tensor | None) -> Tensor:
        """(U,1,Dv): the image's class token."""
        return self._image(states)[:, :1]

    def read(self, tokens: Tokens) -> Tensor:
        """(B,D) of texts alone: the first token's state."""
        return self.encoder(tokens.ids, tokens.mask.long()).last_hidden_state[:, 0]

    def ground(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """(B,1,D) of texts read beside their image."""
        return self.question(states, real, tokens)[:, :1]

    def question(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """(B,T,D) all states of texts read beside their image; an answer is written over them."""
        ids = tokens.ids
        if "match" in self._starts:
            ids = ids.clone()
            ids[:, 0] = self.start_id("match")
        return self.encoder(
            ids,
            tokens.mask.long(),
            encoder_hidden_states=self._image(states),
            encoder_attention_mask=_seen(real, states),
        ).last_hidden_state

    def decode(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """(B,T,D) of texts that see the image and their own past."""
        return self._write(self._image(states), _seen(real, states), tokens)

    def decode_over(self, read: Tensor, mask: Tensor, tokens: Tokens) -> Tensor:
        """(B,T,D) of answers that see a question's states (B,Tq,D) instead of the image."""
        self._check_widths()
        return self._write(read, mask.long(), tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D)."""
        return self.decoder.cls(hidden)

    def generate(
        self, states: Tensor, real: Tensor | None, tokens: Tokens, **decoding: Any
    ) -> Tensor:
        """(B,new) ids written over images after left-padded beginnings (B,T)."""
        return self._generate(self._image(states), _seen(real, states), tokens, decoding)

    def generate_over(self, read: Tensor, mask: Tensor, tokens: Tokens, **decoding: Any) -> Tensor:
        """(B,new) ids written over a question's states."""
        self._check_widths()
        return self._generate(read, mask.long(), tokens, decoding)

    def _write(self, over: Tensor, mask: Tensor, tokens: Tokens) -> Tensor:
        return self.decoder.bert(
            tokens.ids,
            tokens.mask.long(),
            encoder_hidden_states=over,
            encoder_attention_mask=mask,
            is_decoder=True,
            use_cache=False,
        ).last_hidden_state

    def _generate(
        self, over: Tensor, mask: Tensor, tokens: Tokens, decoding: dict[str, Any]
    ) -> Tensor:
        settings = {"do_sample": False, "max_new_tokens": self.max_length, **decoding}
        ids = self.decoder.generate(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            encoder_hidden_states=over,
            encoder_attention_mask=mask,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.end_id,
            **settings,
        )
        return ids[:, tokens.ids.shape[1] :]

    def _image(self, states: Tensor) -> Tensor:
        return self.norm(states.to(self.norm.weight.dtype))

    def _check_widths(self) -> None:
        if self.image_dim != self.dim:
            raise TriptychError(
                f"an answer is written over the question's states of width {self.dim} by layers "
                f"made for image tokens of width {self.image_dim}; make the two widths equal."
            )


class PooledCrossText(CrossText):
    """For towers without a class token: the mean of an image's tokens stands for it."""

    def look(self, states: Tensor, real: Tensor | None) -> Tensor:
        """(U,1,Dv): the mean of the image's tokens."""
        weight = _seen(real, states)[..., None].to(self.norm.weight.dtype)  # (U,P,1)
        return (self._image(states) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


class ApartCrossText(CrossText):
    """Encoder and decoder with weights of their own, as BLIP's question answering trains them."""

    def _share(self) -> None:
        """Nothing is shared but the word table of the decoder and its head."""


def _seen(real: Tensor | None, states: Tensor) -> Tensor:
    """(B,P) 1 where an image token is no padding."""
    if real is None:
        return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    return real.long()

"""A language model alone, trained by the same code: the recipe of the small default's decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.data.processor import ChatProcessor, ImageLoader
from triptych.data.transforms import ImageTransform
from triptych.models.base import Model
from triptych.parts.language import LanguageModel
from triptych.types import Batch


class LanguageOnly(Model):
    """Text dialogues through a causal decoder."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language

    def forward(self, batch: Batch, scored: Tensor | None = None) -> Tensor:
        """Hidden states (B,T,D)."""
        tokens = batch.text["language"]
        return self.language(self.language.embed(tokens), tokens, scored=scored)

    @torch.inference_mode()
    def generate(self, batch: Batch, **decoding: Any) -> Tensor:
        """(B,new) token ids after the left-padded prompts of the batch."""
        tokens = batch.text["language"]
        return self.language.generate(self.language.embed(tokens), tokens, **decoding)

    def processor(self) -> ChatProcessor:
        """What turns samples into batches; images have no place here."""
        return ChatProcessor(self.language.tokenizer, ImageLoader(ImageTransform()), placeholders=0)

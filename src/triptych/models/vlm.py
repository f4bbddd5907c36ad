"""VLM: vision encoder, connector, fusion, language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from triptych.data.instruct import InstructProcessor, InstructSeq2SeqProcessor, Seq2SeqProcessor
from triptych.data.processor import ChatProcessor, ImageLoader
from triptych.data.tagged import TaggedProcessor
from triptych.models.base import Model
from triptych.parts.language import LanguageModel
from triptych.parts.vision import VisionEncoder
from triptych.types import PAD, SHARED, Batch, ImageFeatures, VisualTokens

PROCESSORS = {  # (how the language model attends, whether the connector reads the instruction)
    ("causal", False): ChatProcessor,
    ("causal", True): InstructProcessor,
    ("seq2seq", False): Seq2SeqProcessor,
    ("seq2seq", True): InstructSeq2SeqProcessor,
    ("bidirectional", False): TaggedProcessor,
}
Flat = TypeVar("Flat", ImageFeatures, VisualTokens)


class VLM(Model):
    """A generative vision-language model; a family is a choice of its four parts.

    connector: a config partial, finished here with the widths the parts state.
    fusion: Prefix (LLaVA, BLIP-2, MiniGPT-4, Qwen-VL) or Gated (Flamingo).
    heads: what else is read off the language model's states (OSCAR's tag match).
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Callable[[int, int], nn.Module],
        language: LanguageModel,
        fusion: nn.Module,
        heads: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector(vision.dim, language.dim)
        self.language = language
        self.fusion = fusion
        self.fusion.attach(language, getattr(self.connector, "out_dim", language.dim))
        self.heads = heads and heads(language.dim)

    def forward(self, batch: Batch, scored: Tensor | None = None) -> Tensor:
        """Hidden states (B,T,D) of the language rows, or of the decoder's if it has one.

        scored: (B,T) True where states are read; elsewhere they mean nothing.
        """
        tokens = batch.text["language"]
        embeds = self.language.embed(tokens)  # (B,T,D)
        media = None
        if batch.slots is not None and len(batch.slots):
            visual = self.visual(batch)  # (sum Q, D), one entry a slot
            embeds, media = self.fusion(embeds, visual, batch)
        decoder = batch.text.get("decoder")
        return self.language(embeds, tokens, media=media, decoder=decoder, scored=scored)

    def visual(self, batch: Batch) -> VisualTokens:
        """Encode the U distinct images once and spread them over the S slots."""
        features, images = self.features(batch), batch.slots[:, 0]  # (sum P, D), (S,)
        if self.connector.reads_text:  # a slot has its own text, so its image is read anew
            return self.connector(spread(features, images), batch.text["text"])
        return spread(self.connector(features), images)  # (sum Q, D)

    def features(self, batch: Batch) -> ImageFeatures:
        """Vision tokens of the distinct images: cached ones, or computed now."""
        return batch.images.features or self.vision(batch.images)

    @torch.inference_mode()
    def generate(self, batch: Batch, **decoding: Any) -> Tensor:
        """(B,new) token ids after the left-padded prompts of the batch."""
        tokens = batch.text["language"]
        embeds, media = self.language.embed(tokens), None
        if batch.slots is not None and len(batch.slots):
            embeds, media = self.fusion(embeds, self.visual(batch), batch)
        # rows may share what they read of an image, unless it depends on their own question
        first = None if self.connector.reads_text else first_alike(batch)
        return self.language.generate(embeds, tokens, media, first, **decoding)

    def processor(self) -> ChatProcessor | TaggedProcessor:
        """What turns samples into batches of this model."""
        make = getattr(self.vision, "loader", None)
        loader = make() if make else ImageLoader(self.vision.transform)
        language, more = self.language, {}
        if language.attention == "seq2seq":
            more["start_id"] = language.start_id
        if self.connector.reads_text:
            more["read"] = self.connector.encode
        kind = PROCESSORS[language.attention, self.connector.reads_text]
        return kind(language.tokenizer, loader, self.placeholders(*loader.transform.size), **more)

    def placeholders(self, height: int, width: int) -> int:
        """Placeholder ids an image of this size takes in a row."""
        tokens = self.vision.num_tokens(height, width)
        return self.fusion.placeholders(self.connector.num_tokens(tokens))


def spread(visual: Flat, images: Tensor) -> Flat:
    """From one entry an image (U) to one entry a slot (S), in reading order."""
    starts = visual.counts.cumsum(0) - visual.counts  # (U,)
    counts = visual.counts[images]  # (S,)
    offsets = torch.arange(int(counts.sum()), device=images.device)
    offsets = offsets - (counts.cumsum(0) - counts).repeat_interleave(counts)
    tokens = visual.tokens[starts[images].repeat_interleave(counts) + offsets]
    return type(visual)(tokens, counts)


def first_alike(batch: Batch) -> Tensor:
    """(B,) the first row with the same shared prefix: the same ids over the same images."""
    tokens = batch.text["language"]
    ids = torch.where(tokens.segments == SHARED, tokens.ids, PAD).tolist()
    images: list[list[int]] = [[] for _ in ids]
    for image, row, segment in batch.slots.tolist() if batch.slots is not None else []:
        if segment == SHARED:
            images[row].append(image)
    first: dict[tuple, int] = {}
    keys = [(tuple(row), tuple(seen)) for row, seen in zip(ids, images, strict=True)]
    rows = [first.setdefault(key, i) for i, key in enumerate(keys)]
    return torch.tensor(rows, device=tokens.ids.device)

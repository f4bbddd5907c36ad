"""VLM: vision encoder, connector, fusion, language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triptych.data.processor import ChatProcessor, ImageLoader
from triptych.models.base import Model
from triptych.parts.language import LanguageModel
from triptych.parts.vision import VisionEncoder
from triptych.types import PAD, SHARED, Batch, ImageFeatures, VisualTokens


class VLM(Model):
    """A generative vision-language model; a family is a choice of its four parts.

    connector: a config partial, finished here with the widths the parts state.
    fusion: Prefix (LLaVA, BLIP-2, MiniGPT-4, Qwen-VL) or Gated (Flamingo).
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Callable[[int, int], nn.Module],
        language: LanguageModel,
        fusion: nn.Module,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector(vision.dim, language.dim)
        self.language = language
        self.fusion = fusion

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states (B,T,D) of the language rows."""
        tokens = batch.text["language"]
        embeds = self.language.embed(tokens)  # (B,T,D)
        media = None
        if batch.slots is not None and len(batch.slots):
            visual = self.visual(batch)  # (sum Q, D), one entry a slot
            embeds, media = self.fusion(embeds, visual, batch)
        return self.language(embeds, tokens, media=media)

    def visual(self, batch: Batch) -> VisualTokens:
        """Encode the U distinct images once and spread them over the S slots."""
        features = self.features(batch)  # (sum P, D)
        visual = self.connector(features, batch.text.get("text"))  # (sum Q, D)
        return visual if self.connector.reads_text else spread(visual, batch.slots[:, 0])

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
        return self.language.generate(embeds, tokens, media, first_alike(batch), **decoding)

    def processor(self) -> ChatProcessor:
        """What turns samples into batches of this model."""
        transform = self.vision.transform
        loader = ImageLoader(transform)
        return ChatProcessor(self.language.tokenizer, loader, self.placeholders(*transform.size))

    def placeholders(self, height: int, width: int) -> int:
        """Placeholder ids an image of this size takes in a row."""
        tokens = self.vision.num_tokens(height, width)
        return self.fusion.placeholders(self.connector.num_tokens(tokens))


def spread(visual: VisualTokens, images: Tensor) -> VisualTokens:
    """From one entry an image (U) to one entry a slot (S), in reading order."""
    starts = visual.counts.cumsum(0) - visual.counts  # (U,)
    counts = visual.counts[images]  # (S,)
    offsets = torch.arange(int(counts.sum()), device=images.device)
    offsets = offsets - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return VisualTokens(visual.tokens[starts[images].repeat_interleave(counts) + offsets], counts)


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

"""How visual tokens enter a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triptych.parts.gated_attention import GatedCrossAttention, Media
from triptych.types import PAD, SHARED, Batch, Tokens, TriptychError, VisualTokens

if TYPE_CHECKING:
    from triptych.parts.language import LanguageModel

IMAGE = -200  # the placeholder id: outside every vocabulary, so no table is ever resized


class Prefix(nn.Module):
    """Visual tokens stand among the text tokens, at their placeholders (LLaVA, BLIP-2, Qwen-VL)."""

    def attach(self, language: LanguageModel, visual_dim: int) -> None:
        """Nothing in the language model changes."""

    def placeholders(self, q: int) -> int:
        """How many placeholder ids an image of q visual tokens takes in the row."""
        return q

    def forward(self, embeds: Tensor, visual: VisualTokens, batch: Batch) -> tuple[Tensor, Any]:
        """Overwrite the placeholders' embeddings (B,T,D) with visual tokens (sum Q, D)."""
        places = (batch.text["language"].ids == IMAGE).nonzero(as_tuple=True)  # reading order
        if len(places[0]) != len(visual.tokens):
            raise TriptychError(
                f"{len(places[0])} image placeholders but {len(visual.tokens)} visual tokens in "
                f"the batch of samples {batch.ids}; the data's connector and the model's differ."
            )
        return embeds.index_put(places, visual.tokens.to(embeds.dtype)), None


class Gated(nn.Module):
    """Text looks at images through gated layers in front of every n-th decoder block (Flamingo).

    An image takes one place in the row, at which a learned mark stands; a token sees the latest
    image before it in its own sample, else in the row's shared prefix (arXiv 2204.14198, section
    3.1.3). The language model's own tensors and their names stay as they are.
    """

    audit_grace = 8  # behind gates that start at 0 nothing has a gradient at first

    def __init__(self, every: int = 1, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        if every < 1:
            raise TriptychError("fusion.every starts at 1 (a gated layer before each block).")
        self.every, self.heads, self.head_dim = every, heads, head_dim

    def attach(self, language: LanguageModel, visual_dim: int) -> None:
        """Make the layers for this decoder and hook them in front of its blocks."""
        blocks = language.blocks
        self.mark = nn.Parameter(torch.empty(language.dim).normal_(std=0.02))
        numbers = range(self.every - 1, len(blocks), self.every)
        self.layers = nn.ModuleList(
            GatedCrossAttention(language.dim, visual_dim, self.heads, self.head_dim)
            for _ in numbers
        )
        gated = dict(zip(numbers, self.layers, strict=True))
        for number, block in enumerate(blocks):
            hook = _Hook(gated.get(number))
            block.register_forward_pre_hook(hook, with_kwargs=True)

    def placeholders(self, q: int) -> int:
        """One, however many visual tokens an image has."""
        return 1

    def forward(self, embeds: Tensor, visual: VisualTokens, batch: Batch) -> tuple[Tensor, Media]:
        """Marks at the images' places (B,T,D), and the media the decoder's blocks look at."""
        tokens, slots = batch.text["language"], batch.slots
        places = (tokens.ids == IMAGE).nonzero(as_tuple=True)  # (S,) rows, columns; reading order
        if len(places[0]) != len(visual.counts):
            raise TriptychError(
                f"{len(places[0])} image places but {len(visual.counts)} images in the batch of "
                f"samples {batch.ids}; the data's fusion and the model's differ."
            )
        embeds = embeds.index_put(places, self.mark.to(embeds.dtype))
        order = _order_in_row(slots[:, 1])  # (S,)
        shape = (len(tokens.ids), int(order.max()) + 1, int(visual.counts[0]))
        stacked = visual.tokens.view(len(slots), shape[2], -1)  # (S,Q,D)
        media = stacked.new_zeros(*shape, stacked.shape[-1])  # (B,M,Q,D)
        media = media.index_put((slots[:, 1], order), stacked)
        return embeds, Media(media, latest_image(tokens))


class _Hook:
    """Run a gated layer before its block, and take the media out of the block's arguments.

    They come as an argument, not as a state of the module, so that a recomputed block (activation
    checkpointing) sees what it saw first.
    """

    def __init__(self, layer: GatedCrossAttention | None) -> None:
        self.layer = layer  # not registered: the fusion owns it

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        media = kwargs.pop("media", None)
        if self.layer is None:
            return args, kwargs
        if args:
            return (self.layer(args[0], media), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.layer(kwargs["hidden_states"], media)}


def latest_image(tokens: Tokens) -> Tensor:
    """(B,T) number in its row of the image each token sees, -1 for none.

    That is the last one at or before the token in its own segment, else the prefix's last.
    """
    ids, segments = tokens.ids, tokens.segments
    image = ids == IMAGE  # (B,T)
    number = image.long().cumsum(1) - 1  # of the latest image in the row, whose ever it is
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(image, index, -1).cummax(1).values  # (B,T) where it stands
    own = (last >= 0) & (segments.gather(1, last.clamp_min(0)) == segments)
    shared = torch.where(image & (segments == SHARED), number, -1).amax(1, keepdim=True)
    shared = torch.where(segments > 0, shared.expand_as(ids), -1)  # a prefix token sees its past
    return torch.where(segments == PAD, -1, torch.where(own, number, shared))


def _order_in_row(rows: Tensor) -> Tensor:
    """(S,) how many slots of the same row stand before each; rows are in reading order."""
    index = torch.arange(len(rows), device=rows.device)
    first = torch.searchsorted(rows.contiguous(), rows.contiguous())
    return index - first

"""FusionEncoder: embeds, matches and describes images with one text part (BLIP, BLIP-2 stage 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.data.pair_processor import PairProcessor
from triptych.data.processor import ImageLoader
from triptych.models.base import Model
from triptych.models.momentum import Momentum
from triptych.parts.attention import padded
from triptych.parts.vision import VisionEncoder
from triptych.types import Batch, Images, Tokens, TriptychError


class MatchHeads(nn.Module):
    """Projections to the shared width E, the two-way match head, and the learned scale.

    scale: initial multiplier of the cosine. bounds: where it is kept after each step; BLIP keeps
    its temperature within 0.001 and 0.5 (`blip_pretrain.py`).
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        dim: int = 256,
        scale: float = 1 / 0.07,
        bounds: tuple[float, float] = (2.0, 1000.0),
    ) -> None:
        super().__init__()
        self.dim, self.bounds = dim, tuple(bounds)
        self.vision = nn.Linear(image_dim, dim)
        self.text = nn.Linear(text_dim, dim)
        self.match = nn.Linear(text_dim, 2)  # no, yes
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))


class FusionEncoder(Model):
    """A vision encoder and a text part that reads, matches and writes.

    connector: CrossText (BLIP) or PairQFormer (BLIP-2 stage 1). momentum: BLIP's teacher and queue,
    finished here; without one the contrastive term compares the batch with itself.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Callable[[int, None], nn.Module],
        heads: Callable[[int, int], MatchHeads],
        momentum: Callable[..., Momentum] | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector(vision.dim, None)
        self.heads = heads(self.connector.image_dim, self.connector.dim)
        self.momentum = momentum and momentum(self._student(), self.heads.dim)

    @property
    def unused(self) -> list[str]:
        """The tower's own final norm too: the connector's `norm` stands in its place."""
        names = ("post_layernorm", "pooler", "head") if self.vision.layer == -1 else ()
        tower = [f"vision.model.{n}" for n in names if hasattr(self.vision.model, n)]
        return super().unused + tower

    def states(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Vision tokens (U,P,D) of the distinct images, and which are real (None = all)."""
        return padded(images.features or self.vision(images))

    def embed_images(self, images: Images) -> Tensor:
        """(U,K,E) of unit norm; K = 1, or a Q-Former's queries."""
        return image_embeddings(self, *self.states(images))

    def embed_texts(self, tokens: Tokens) -> Tensor:
        """(B,E) of unit norm."""
        return text_embeddings(self, tokens)

    def match(self, batch: Batch) -> Tensor:
        """(B,2) logits of "no" and "yes" for each row's image and text."""
        states, real = self._rows(batch)
        return self.match_logits(states, real, batch.text["text"])

    def match_logits(self, states: Tensor, real: Tensor | None, tokens: Tokens) -> Tensor:
        """(pairs,2): the match head on each state that read the pair, averaged."""
        return self.heads.match(self.connector.ground(states, real, tokens)).mean(1)

    def forward(self, batch: Batch, scored: Tensor | None = None) -> Tensor:
        """States (B,T,D) of text["decoder"], over the image or over text["question"] beside it."""
        states, real = self._rows(batch)
        question = batch.text.get("question")
        if question is None:
            return self.connector.decode(states, real, batch.text["decoder"])
        read = self._reader().question(states, real, question)
        return self.connector.decode_over(read, question.mask, batch.text["decoder"])

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D)."""
        return self.connector.logits(hidden)

    @torch.inference_mode()
    def generate(self, batch: Batch, **decoding: Any) -> Tensor:
        """(B,new) ids after text["decoder"]: a caption, or the answer to text["question"]."""
        states, real = self._rows(batch)
        beginnings, question = batch.text["decoder"], batch.text.get("question")
        if question is None:
            return self.connector.generate(states, real, beginnings, **decoding)
        read = self._reader().question(states, real, question)
        return self.connector.generate_over(read, question.mask, beginnings, **decoding)

    def teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's embeddings of the batch's rows: (B,E) images, (B,E) texts."""
        with torch.no_grad():
            self.momentum.start(self._student())
            states, real = padded(batch.images.features or self.momentum.vision(batch.images))
            images = image_embeddings(self.momentum, states, real)[batch.slots[:, 0], 0]
            return images, text_embeddings(self.momentum, batch.text["text"])

    def processor(self) -> PairProcessor:
        """What turns samples into batches of this model."""
        return PairProcessor(self.connector, ImageLoader(self.vision.transform))

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        low, high = (math.log(b) for b in self.heads.bounds)
        self.heads.logit_scale.clamp_(low, high)
        if self.momentum is not None:
            self.momentum.step(self._student())

    def _student(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {"vision": self.vision, "connector": self.connector, "heads": self.heads}
        )

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        states, real = self.states(batch.images)
        index = batch.slots[:, 0]
        return states[index], None if real is None else real[index]

    def _reader(self) -> nn.Module:
        if not hasattr(self.connector, "question"):
            raise TriptychError(
                "this connector writes over images alone and the batch brings questions; use "
                "CrossText (model=blip), or stage 2 of BLIP-2, which answers by a language model."
            )
        return self.connector


def image_embeddings(parts: nn.Module, states: Tensor, real: Tensor | None) -> Tensor:
    """(U,K,E) of unit norm, by the student's parts or the teacher's."""
    return F.normalize(parts.heads.vision(parts.connector.look(states, real)), dim=-1)


def text_embeddings(parts: nn.Module, tokens: Tokens) -> Tensor:
    """(B,E) of unit norm."""
    return F.normalize(parts.heads.text(parts.connector.read(tokens)), dim=-1)

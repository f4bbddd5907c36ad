"""What the evaluator sees of a model, be it trained here, hosted in a library, or remote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from triptych.types import ImageRef, Sample


class Score(NamedTuple):
    """Log-likelihood of one candidate, kept so that every normalisation can be recomputed."""

    sum: float  # natural logarithm, over all its tokens with the stop token
    tokens: int
    bytes: int  # of its text in UTF-8


class Predictor(Protocol):
    """A model with the methods that `capabilities` names; the others need not exist.

    "caption" is `generate` without a prompt; "sentences" is `loglikelihood` of candidates of any
    length, with a picture or without.

    `batch_size` rows run together; no answer depends on it. `vision_calls` (images the encoder
    really encoded) and `generated_tokens` only ever grow: the evaluator takes differences.
    """

    capabilities: frozenset[str]  # the methods' names, embed, caption, sentences
    batch_size: int
    vision_calls: int
    generated_tokens: int

    def generate(self, samples: Sequence[Sample], **decoding) -> list[str]:
        """An answer to each sample's prompt; greedy unless `decoding` says otherwise."""
        ...

    def loglikelihood(
        self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """For each sample the Score of each of its candidates as the next assistant turn."""
        ...

    def embed_images(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,K,E) unit vectors in float32 on the CPU, K an image."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N,E) unit vectors in float32 on the CPU."""
        ...

    def match(self, refs: Sequence[ImageRef], texts: Sequence[str]) -> Tensor:
        """(N,2) logits of "no" and "yes" for N pairs of an image and a text, on the CPU."""
        ...

    def features(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,D) image vectors before any projection, for a linear probe."""
        ...

"""How the card asks where the common scorers cannot: captions, gains by the image, letters."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from triptych.evaluation.baselines import question_of
from triptych.evaluation.metrics import parse_choice
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Generate, Outcome
from triptych.evaluation.similarity import best
from triptych.types import Sample, user


@dataclass
class Describe:
    """A caption from models that read no instruction beside an image (BLIP, BLIP-2 stage 1)."""

    max_new_tokens: int = 48
    decoding: dict = field(default_factory=dict)
    name: str = "caption"
    needs: str = "caption"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """One caption a sample; its question is not shown."""
        silent = [replace(s, messages=[user("", images=len(s.images))]) for s in samples]
        return Generate(self.max_new_tokens, self.decoding).ask(predictor, silent)


@dataclass
class ImageGain:
    """The candidate whose log-likelihood the image raises most: log P(c | image) - log P(c).

    Without the subtraction odd captions lose whatever the picture shows (arXiv 2306.01879).
    """

    name: str = "loglikelihood_pmi"
    needs: str = "sentences"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best candidate of each sample, with all gains in the candidates' order."""
        candidates = [sample.candidates for sample in samples]
        seeing = predictor.loglikelihood(samples, candidates)
        words = [replace(s, messages=[user(question_of(s))], images=[]) for s in samples]
        blind = predictor.loglikelihood(words, candidates)
        return [
            best(sample.candidates, np.array([a.sum - b.sum for a, b in zip(s, w, strict=True)]))
            for sample, s, w in zip(samples, seeing, blind, strict=True)
        ]


@dataclass
class Choose:
    """Lettered options in the prompt, for models that only write (APIs among them)."""

    instruction: str = "Which text describes the image? Answer with the letter alone."
    max_new_tokens: int = 16
    decoding: dict = field(default_factory=dict)
    name: str = "choice"
    needs: str = "generate"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The option whose letter or words are read from the answer; else none is chosen."""
        asked = [replace(s, messages=[user(self._prompt(s), images=1)]) for s in samples]
        outcomes = Generate(self.max_new_tokens, self.decoding).ask(predictor, asked)
        for sample, outcome in zip(samples, outcomes, strict=True):
            letter = parse_choice(outcome.raw, sample.candidates)
            if letter is not None:
                outcome.parsed = sample.candidates[string.ascii_uppercase.index(letter)]
        return outcomes

    def _prompt(self, sample: Sample) -> str:
        lettered = zip(string.ascii_uppercase, sample.candidates, strict=False)
        return "\n".join([*(f"{letter}. {words}" for letter, words in lettered), self.instruction])

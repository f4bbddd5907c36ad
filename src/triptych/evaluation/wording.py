"""The same scorers with the words in which a benchmark asks: an instruction, or lettered options.

A benchmark's samples hold the bare question, so that an encoder of captions reads just that.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from triptych.evaluation.baselines import question_of
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Generate, Likelihood, Outcome
from triptych.types import Sample, TriptychError

BY_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass
class Ask(Generate):
    """Free generation with `instruction` on a line under the question."""

    instruction: str = ""

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        return super().ask(predictor, [instructed(s, self.instruction) for s in samples])


@dataclass
class Rank(Likelihood):
    """The likeliest candidate, with `instruction` on a line under the question."""

    instruction: str = ""

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        return super().ask(predictor, [instructed(s, self.instruction) for s in samples])


@dataclass
class AskLetter(Generate):
    """Free generation under the lettered options; the benchmark's parser reads the letter."""

    max_new_tokens: int = 16
    decoding: dict = field(default_factory=dict)
    instruction: str = BY_LETTER

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        return super().ask(predictor, [lettered(s, self.instruction) for s in samples])


@dataclass
class RankLetter(Likelihood):
    """The option whose letter is likeliest under the lettered options; ties go to none."""

    instruction: str = BY_LETTER

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        asked = [lettered(sample, self.instruction) for sample in samples]
        letters = [replace(s, candidates=list(letters_of(s))) for s in asked]
        outcomes = super().ask(predictor, letters)
        for sample, outcome in zip(samples, outcomes, strict=True):
            if outcome.parsed is not None:
                outcome.parsed = letters_of(sample)[outcome.parsed]
        return outcomes


def instructed(sample: Sample, instruction: str) -> Sample:
    """The sample with `instruction` under its last question; "" changes nothing."""
    if not instruction:
        return sample
    question = question_of(sample)
    return _reworded(sample, f"{question}\n{instruction}" if question else instruction)


def lettered(sample: Sample, instruction: str = BY_LETTER) -> Sample:
    """The sample with its hint above its question and its options below, one a line."""
    hint = sample.meta.get("hint")
    lines = [f"Context: {hint}"] if hint else []
    lines += [question_of(sample)]
    lines += [f"{letter}. {text}" for letter, text in letters_of(sample).items()]
    return _reworded(sample, "\n".join([*lines, instruction]).strip())


def letters_of(sample: Sample) -> dict[str, str]:
    """The options by letter."""
    if not 2 <= len(sample.candidates) <= len(string.ascii_uppercase):
        raise TriptychError(
            f"sample '{sample.id}' has {len(sample.candidates)} options; letters need 2 to 26."
        )
    return dict(zip(string.ascii_uppercase, sample.candidates, strict=False))


def _reworded(sample: Sample, text: str) -> Sample:
    """The sample with other words in its last user turn; its pictures stay in front."""
    last = max(i for i, m in enumerate(sample.messages) if m["role"] == "user")
    turn = sample.messages[last]
    content = [part for part in turn["content"] if part["type"] != "text"]
    content = [*content, {"type": "text", "text": text}]
    messages = list(sample.messages)
    messages[last] = {**turn, "content": content}
    return replace(sample, messages=messages)

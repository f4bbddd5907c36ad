"""Ranking candidates by their log-likelihood under the normalisations in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from triptych.evaluation.metrics._shared import choose, mistake

# the field each rule divides by; "pmi" subtracts `prior` instead
RANKING_RULES = ("sum", "token", "char", "byte", "pmi")
_DIVISOR = {"token": "tokens", "char": "chars", "byte": "bytes"}


class CandidateScore(NamedTuple):
    """The log-likelihood of one candidate and the lengths that every rule can be recomputed from.

    `sum` is log P(candidate | image, prompt), natural logarithm, higher is better; `prior` is the
    same without the image.
    """

    sum: float
    tokens: int | None = None
    chars: int | None = None
    bytes: int | None = None
    prior: float | None = None


class Ranking(NamedTuple):
    """Candidates under one rule: `values` as given, `order` best first (ties as given)."""

    rule: str
    values: list[float]
    order: list[int]

    @property
    def best(self) -> int:
        """The first candidate of the highest value; see `winners` for ties."""
        return self.order[0]

    @property
    def winners(self) -> list[int]:
        """All candidates that share the highest value."""
        return [i for i in self.order if self.values[i] == self.values[self.order[0]]]

    def credit(self, gold: int) -> float:
        """1 if `gold` alone wins, 1/n if n candidates tie with it at the top, else 0.

        Accuracy from credits gives chance to a model that scores every candidate alike.
        """
        return float(gold in self.winners) / len(self.winners)


def rank_candidates(scores: Sequence[Any], rule: str = "sum") -> Ranking:
    """Rank the candidates of one sample by log-likelihood, higher is better under every rule.

    `scores` hold `sum` and what the rule needs, as attributes (`CandidateScore`) or mappings:
    `sum` needs no more (BLIP), `token` divides by tokens (OpenFlamingo), `char` by characters,
    `byte` by UTF-8 bytes, `pmi` subtracts `prior`, the log-likelihood without the image. The rules
    can give different winners, so the rule belongs to the result.
    """
    choose(rule, RANKING_RULES, "rank_candidates")
    if not len(scores):
        raise mistake("rank_candidates: the sample has no candidates.")
    values = []
    for place, score in enumerate(scores):
        value = _field(score, "sum", rule, place)
        if rule == "pmi":
            value -= _field(score, "prior", rule, place)
        elif rule != "sum":
            length = _field(score, _DIVISOR[rule], rule, place)
            if length <= 0:
                raise mistake(f"rank_candidates: candidate {place} is empty; remove it.")
            value /= length
        values.append(value)
    order = np.argsort(-np.array(values), kind="stable").tolist()
    return Ranking(rule, values, order)


def _field(score: Any, name: str, rule: str, place: int) -> float:
    value = score.get(name) if isinstance(score, Mapping) else getattr(score, name, None)
    if value is None or callable(value) or np.isnan(value):
        raise mistake(f"rank_candidates: rule '{rule}' needs '{name}' of candidate {place}.")
    return float(value)

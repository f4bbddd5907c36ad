"""How a model is asked: the evaluator takes the first accepted scorer that the model can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from triptych.evaluation.predictor import Predictor
from triptych.types import Sample, TriptychError

FAILED = ("timeout", "error")  # states of an Outcome that holds no answer; "refusal" holds words


@dataclass
class Outcome:
    """What a model said to one sample; `parsed` is filled by scorers that choose a candidate."""

    raw: str
    parsed: str | None = None
    scores: list[float] = field(default_factory=list)
    extra: dict = field(default_factory=dict)  # what else the scorer knows, for the record


class Scorer(Protocol):
    """Asks a predictor; `name` stands in the results and `needs` is the capability it uses.

    One that sets `whole` is asked once, with all samples; others batch by batch.
    """

    name: str
    needs: str

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample."""
        ...


@dataclass
class Generate:
    """Free generation, greedy unless told otherwise; the benchmark's parser reads the text.

    A predictor that knows more than the text (refusals, time-outs) tells it by `respond`.
    """

    max_new_tokens: int = 16
    decoding: dict = field(default_factory=dict)
    name: str = "generate"
    needs: str = "generate"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """One generated text a sample."""
        if hasattr(predictor, "respond"):
            return predictor.respond(samples, self.max_new_tokens, **self.decoding)
        texts = predictor.generate(samples, max_new_tokens=self.max_new_tokens, **self.decoding)
        return [Outcome(text) for text in texts]


@dataclass
class Likelihood:
    """The candidate with the highest log-likelihood, summed over its tokens.

    Ties go to no candidate: a constant model must not win by the order of the list.
    """

    name: str = "loglikelihood"
    needs: str = "loglikelihood"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best candidate of each sample, with all sums in the candidates' order."""
        for sample in samples:
            if len(sample.candidates) < 2:
                raise TriptychError(
                    f"sample '{sample.id}' has no closed list of answers to rank; "
                    "use the scorer generate."
                )
        ranked = predictor.loglikelihood(samples, [sample.candidates for sample in samples])
        outcomes = []
        for sample, scores in zip(samples, ranked, strict=True):
            sums = [score.sum for score in scores]
            best = max(sums)
            choice = sample.candidates[sums.index(best)] if sums.count(best) == 1 else ""
            sizes = {
                "candidate_tokens": [score.tokens for score in scores],
                "candidate_bytes": [score.bytes for score in scores],
            }
            outcomes.append(Outcome(choice, choice or None, sums, sizes))
        return outcomes


def able(
    scorers: Sequence[Scorer], predictor: Predictor, benchmark: str, wanted: str | None = None
) -> list[tuple[Scorer, str]]:
    """The first scorer whose capability the predictor declares, or the `wanted` one, or "all".

    Beside each stands what its metric keys end in: "" for the first, else "@name".
    """
    there = [s for s in scorers if s.needs in predictor.capabilities]
    if not there:
        accepted = " or ".join(scorer.needs for scorer in scorers)
        offered = ", ".join(sorted(predictor.capabilities)) or "nothing"
        raise TriptychError(
            f"benchmark '{benchmark}' needs a model that can do {accepted}, and this one offers "
            f"{offered}; leave it out (benchmark=none) or choose another model."
        )
    named = [(s, f"@{s.name}" if i else "") for i, s in enumerate(there)]
    if wanted in (None, "all"):
        return named if wanted else named[:1]
    if wanted not in [scorer.name for scorer in there]:
        names = ", ".join(scorer.name for scorer in there)
        raise TriptychError(
            f"eval.scorer={wanted} is none that benchmark '{benchmark}' accepts of this model; "
            f"choose of {names}, or all."
        )
    return [pair for pair in named if pair[0].name == wanted]

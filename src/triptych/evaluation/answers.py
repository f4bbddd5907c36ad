"""Short answers in free words, each judged by the official rule of its benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from triptych.evaluation.baselines import question_of
from triptych.evaluation.benchmark import AnswerBenchmark, Metrics, Record, with_interval
from triptych.evaluation.metrics import RULES, gqa_exact, vqa_accuracy
from triptych.evaluation.metrics.okvqa import Stemmer
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.evaluation.wording import Ask, Rank
from triptych.types import Sample

Metric = Callable[[str, Sequence[str]], float]


class ScoredBenchmark(AnswerBenchmark):
    """The mean of `metric(answer, gold answers)`, in [0, 1], over all samples and every slice.

    samples: with the gold answers in meta["answers"]. metric: a function of
    `triptych.evaluation.metrics`, or any other; `key` (default: its name) is the metric's key and
    `rule` its rule's name. instruction: a line under every question. A blank answer is `unparsed`;
    what it scores is the rule's business. `majority` is the score of the one gold answer given most
    often, said to every question.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        metric: Metric,
        key: str | None = None,
        rule: str | None = None,
        train: Sequence[Sample] | None = None,
        slice_by: str | None = None,
        instruction: str = "",
        max_new_tokens: int = 16,
        scorers: Sequence[Scorer] | None = None,
        blind_subset: str | None = None,
    ) -> None:
        ways = [
            Ask(max_new_tokens, instruction=instruction),
            Rank(instruction=instruction),
            Similarity(),
        ]
        super().__init__(samples, train, slice_by, scorers=scorers or ways)
        self.metric, self.key = metric, key or _name(metric)
        self.rule = rule or _rule(metric)

    def judge(self, text: str, answers: Sequence[str]) -> float:
        """The score of one answer."""
        return float(self.metric(text, answers))

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row: the answer stripped of blanks around it, and its score in `correct`."""
        text = (outcome.raw if outcome.parsed is None else outcome.parsed).strip()
        answers = list(sample.meta["answers"])
        return {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.id,
            "image": ", ".join(image.name for image in sample.images),
            "question": question_of(sample),
            "gold": str(sample.target),
            "answers": answers,
            "candidates": len(set(sample.candidates)),
            "raw_output": outcome.raw,
            "parsed": text or None,
            "correct": self.judge(text, answers),
            "parser": "stripped",
            "slice": str(sample.meta.get(self.slice_by, "other")) if self.slice_by else "",
            **({"scores": outcome.scores} if outcome.scores else {}),
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """The mean score of all records and of each slice, with the rate of unparsed answers."""
        slices = sorted({record["slice"] for record in records} - {""})
        made = {self.key: self._entry(records)}
        for name in slices:
            made[f"{self.key}/{name}"] = self._entry([r for r in records if r["slice"] == name])
        return made

    def _entry(self, records: Sequence[Record]) -> dict[str, Any]:
        usual = Counter(record["gold"] for record in records).most_common(1)[0][0]
        always = sum(self.judge(usual, record["answers"]) for record in records)
        return with_interval([record["correct"] for record in records], records) | {
            "unparsed": sum(record["parsed"] is None for record in records) / len(records),
            "chance": None,  # of an open answer
            "majority": always / len(records),
            "rule": self.rule,
            "parser": "stripped",
        }


class OKVQABenchmark(ScoredBenchmark):
    """VQA accuracy on OK-VQA's stemmed answers; predictions are stemmed as the annotators' were.

    samples: the reader VQA over OK-VQA's files, whose pairs of raw and stemmed answers teach the
    stemmer. Official normalisation of VQAv2 otherwise.
    """

    def __init__(self, samples: Any, **options: Any) -> None:
        super().__init__(samples, partial(vqa_accuracy, rule="official"), **options)

    @cached_property
    def stemmer(self) -> Stemmer:
        """Counted once from the annotations, when the first answer is judged."""
        return Stemmer(self.samples.stems())

    def judge(self, text: str, answers: Sequence[str]) -> float:
        return super().judge(self.stemmer.stem(text), answers)

    def metrics(self, records: Sequence[Record]) -> Metrics:
        made = super().metrics(records)
        return {key: entry | {"stemmer": self.stemmer.name} for key, entry in made.items()}


def gqa_answer(text: str, answers: Sequence[str], rule: str = "rstrip_lower") -> float:
    """`gqa_exact` against the only gold answer of a GQA question."""
    return gqa_exact(text, answers[0], rule)


def _name(metric: Metric) -> str:
    inner = metric.func if isinstance(metric, partial) else metric
    return getattr(inner, "__name__", type(inner).__name__)


def _rule(metric: Metric) -> str:
    chosen = metric.keywords.get("rule") if isinstance(metric, partial) else None
    return chosen or RULES.get(_name(metric), (_name(metric),))[0]

"""A benchmark states samples, accepted scorers and metrics; it is blind to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from triptych.evaluation.baselines import Prior, question_of
from triptych.evaluation.matching import Match
from triptych.evaluation.metrics.stats import clustered_bootstrap, wilson
from triptych.evaluation.parsers import exact_answer, normalize_answer
from triptych.evaluation.scorers import Generate, Likelihood, Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.types import DataError, Sample, TriptychError

SUBSETS = Path(__file__).parent / "subsets"

Record = dict[str, Any]  # a row of samples.parquet; `correct` and `slice` are in every one
Metrics = dict[str, dict[str, Any]]  # "accuracy" or "accuracy/color" -> value, n, low, high, ...


class Benchmark(Protocol):
    """What the evaluator asks of a benchmark.

    `metrics` is called with the records of any set of the samples: all, the blind subset, or the
    prior's guesses; so each number and its baselines come from one function. `prior` is None
    without a training split; `blind_ids` is the fixed blind subset (empty: drawn by rule). One that
    sets `permuted = False` has no blind run.
    """

    samples: Sequence[Sample]
    scorers: Sequence[Scorer]
    blind_ids: list[str]

    @property
    def prior(self) -> Prior | None:
        """The best guess from the question alone."""
        ...

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """Parse and judge one outcome."""
        ...

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Values with intervals by metric[/slice]."""
        ...


class AnswerBenchmark:
    """Exact-match accuracy of short answers, closed (`Sample.candidates`) or open.

    samples: each with a `target`; `train`: the training split for the prior. `slice_by` names the
    field of `Sample.meta` that splits the accuracy. `parser(text, candidates)` reads a generated
    answer of at most `max_new_tokens`; its name is in the results. `scorers` (default: Generate,
    then Likelihood, Match, Similarity) are accepted in their order. `blind_subset` is a file of
    sample ids (a name of `evaluation/subsets` or a path), and `subset` one of the only samples that
    are asked. Intervals are bootstrapped by
    `Sample.cluster`; where no cluster differs they are Wilson's over the clusters.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        slice_by: str | None = None,
        parser: Callable[[str, Sequence[str]], str | None] = exact_answer,
        max_new_tokens: int = 16,
        scorers: Sequence[Scorer] | None = None,
        blind_subset: str | None = None,
        subset: str | None = None,
    ) -> None:
        samples = samples if subset is None else _only(samples, subset)
        self.samples, self.train, self.slice_by, self.parser = samples, train, slice_by, parser
        ways = [Generate(max_new_tokens), Likelihood(), Match(), Similarity()]
        self.scorers = list(scorers) if scorers else ways
        self.blind_ids = _read_ids(blind_subset, "blind_subset") if blind_subset else []

    @cached_property
    def prior(self) -> Prior | None:
        """Counted once from the training split, when it is first asked for."""
        return Prior(self.train) if self.train is not None and len(self.train) else None

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row: the answer as read by the parser, and whether it is the gold one."""
        if sample.target is None:
            raise TriptychError(f"sample '{sample.id}' has no target; end it on its gold answer.")
        parsed = outcome.parsed or self.parser(outcome.raw, sample.candidates)
        parsed = None if parsed is None else normalize_answer(parsed)
        return {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.id,
            "image": ", ".join(image.name for image in sample.images),
            "question": question_of(sample),
            "gold": str(sample.target),
            "candidates": len(set(sample.candidates)),
            "raw_output": outcome.raw,
            "parsed": parsed,
            "correct": float(parsed is not None and parsed == normalize_answer(sample.target)),
            "parser": getattr(self.parser, "__name__", type(self.parser).__name__),
            "slice": str(sample.meta.get(self.slice_by, "other")) if self.slice_by else "",
            **({"scores": outcome.scores} if outcome.scores else {}),
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Accuracy of all records and of each slice, with the rate of unparsed answers."""
        slices = sorted({record["slice"] for record in records} - {""})
        parts = {f"accuracy/{name}": [r for r in records if r["slice"] == name] for name in slices}
        return {key: _accuracy(rows) for key, rows in {"accuracy": list(records), **parts}.items()}


def with_interval(values: Sequence[float], records: Sequence[Record]) -> dict[str, Any]:
    """The mean of one value in [0, 1] a record, with its interval by cluster."""
    clusters = [record["cluster_id"] for record in records]
    value, low, high = clustered_bootstrap(values, clusters)
    if not low < high:  # all images score alike, or there is one: resampling shows no spread
        images = len(set(clusters))
        _, low, high = wilson(value * images, images)
    return {"value": value, "n": len(records), "low": low, "high": high}


def _accuracy(records: list[Record]) -> dict[str, Any]:
    closed = all(record["candidates"] for record in records)
    chance = sum(1 / record["candidates"] for record in records) / len(records) if closed else None
    golds = Counter(normalize_answer(record["gold"]) for record in records)
    return with_interval([record["correct"] for record in records], records) | {
        "unparsed": sum(record["parsed"] is None for record in records) / len(records),
        "chance": chance,
        "majority": max(golds.values()) / len(records),  # of one answer to every question
        "parser": records[0]["parser"],
    }


def _only(samples: Sequence[Sample], subset: str) -> list[Sample]:
    """The samples that a file of ids names, in their own order."""
    wanted = set(_read_ids(subset, "subset"))
    found = [sample for sample in samples if sample.id in wanted]
    if len(found) < len(wanted):
        lost = sorted(wanted - {sample.id for sample in found})
        raise DataError(
            f"the subset '{subset}' names {len(lost)} samples that the benchmark does not have "
            f"(first: {lost[0]}); give ids of its split."
        )
    return found


def _read_ids(name: str, option: str) -> list[str]:
    path = SUBSETS / f"{name}.txt" if not Path(name).suffix else Path(name)
    if not path.is_file():
        raise TriptychError(f"{option} '{name}' does not exist; give a file of sample ids.")
    return path.read_text(encoding="utf-8").split()

"""From answers to numbers: records, metrics and baselines, with no model anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triptych.evaluation.benchmark import Benchmark, Metrics, Record
from triptych.evaluation.identity import digest, scoring_facts
from triptych.evaluation.llm_judge import KEY, LlmJudge, needs_judging
from triptych.evaluation.scorers import FAILED, Outcome
from triptych.evaluation.task import Task
from triptych.types import Sample, TriptychError


@dataclass
class Judged:
    """One benchmark under one scorer; `facts` says what its answers and its numbers depend on.

    left_out: metrics that could not be computed, and why.
    """

    samples: Sequence[Sample]
    records: list[Record]
    metrics: Metrics
    facts: dict[str, Any]
    suffix: str = ""  # "@scorer" if it is not the benchmark's first
    timing: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def judge(
    task: Task,
    header: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    rows: Sequence[int],
    permuted: Sequence[Sample],
    seen: Sequence[Outcome],
    llm: LlmJudge | None = None,
) -> Judged:
    """Records and metrics of the model and of the two baselines, by the same functions.

    llm: grades answers in free words once more; where it cannot, `left_out` says why.
    """
    benchmark, samples = task.benchmark, task.samples
    records = [_record(benchmark, s, o) for s, o in zip(samples, outcomes, strict=True)]
    words = task.guesses()
    guesses = [benchmark.record(s, Outcome(w, w)) for s, w in zip(samples, words, strict=False)]
    blind = [_record(benchmark, s, o) for s, o in zip(permuted, seen, strict=True)]
    left_out = {f"{task.name}/{k}": v for k, v in getattr(benchmark, "left_out", {}).items()}
    judges: LlmJudge | None = None
    if llm is not None:
        try:
            if not needs_judging(benchmark, records, outcomes):
                raise TriptychError(f"the scorer {header['scorer']} leaves nothing to judge.")
            llm.mark(task.name, records, guesses, blind)
            judges = llm
        except TriptychError as error:  # the benchmark's own numbers stand without it
            left_out[f"{task.name}/{KEY}{header['suffix']}"] = str(error)
    joined = _join(*(_metrics(benchmark, rows, judges) for rows in (records, guesses, blind)))
    scoring = scoring_facts(benchmark, samples, words)
    hashes = {"inference_hash": header.get("hash"), "scoring_hash": scoring["hash"]}
    scorer, suffix = header["scorer"], header["suffix"]
    metrics = {}
    for key, entry in joined.items():
        metrics[f"{task.name}/{key}{suffix}"] = entry | {"scorer": scorer} | hashes
        if "/" not in key:
            metrics[f"{task.name}/{key}{suffix}"] |= _failures(outcomes)
    for sample, record in zip(samples, records, strict=True):
        record.update(benchmark=task.name, scorer=scorer, prior=None, blind=None)
        record["image_key"] = ",".join(image.key for image in sample.images)
    for record, guess in zip(records, guesses, strict=False):
        record["prior"] = guess["parsed"]
    for row, record in zip(rows, blind, strict=False):
        records[row]["blind"] = record["parsed"] or ""
    facts = {"inference": dict(header), "scoring": scoring}
    if judges is not None:
        facts["judge"] = judges.facts()
        both = digest([scoring["hash"], facts["judge"]["hash"]])
        metrics[f"{task.name}/{KEY}{suffix}"]["scoring_hash"] = both
    return Judged(samples, records, metrics, facts, suffix, left_out=left_out)


def _metrics(benchmark: Benchmark, records: list[Record], llm: LlmJudge | None) -> Metrics:
    """The benchmark's metrics, and the judge's if there is one."""
    if not records:
        return {}
    judged = {} if llm is None else {KEY: llm.metric(records)}
    return benchmark.metrics(records) | judged


def _record(benchmark: Benchmark, sample: Sample, outcome: Outcome) -> Record:
    """The benchmark's row, with what else the scorer knows; no answer is never a right one."""
    record = benchmark.record(sample, outcome)
    for key, value in outcome.extra.items():
        record.setdefault(key, value)
    if outcome.extra.get("status") in FAILED:
        record |= {"parsed": None, "correct": 0.0}
    return record


def _failures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Rates of refusals, time-outs and errors, for models that can fail to answer."""
    states = [o.extra["status"] for o in outcomes if "status" in o.extra]
    names = {"refusal": "refusals", "timeout": "timeouts", "error": "errors"} if states else {}
    return {word: round(states.count(s) / len(outcomes), 6) for s, word in names.items()}


def _join(metrics: Metrics, prior: Metrics, blind: Metrics) -> Metrics:
    """Write each baseline's value, interval and n beside the score of the same key."""
    baselines = {"prior": prior, "blind": blind}
    joined: Metrics = {}
    for key, entry in metrics.items():
        entry = dict(entry)
        for name, others in baselines.items():
            other = others.get(key, {})
            entry[name] = other.get("value")
            entry |= {f"{name}_{part}": other.get(part) for part in ("low", "high", "n")}
        entry["uses_images"] = _beats(entry, list(baselines))
        joined[key] = {k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}
    return joined


def _beats(entry: dict[str, Any], baselines: list[str]) -> bool | None:
    """Whether the value is beyond both baselines, intervals included; None if one is not known."""
    lower = entry.get("better") == "lower"  # an error rate
    own = entry.get("high" if lower else "low")
    others = [entry.get(f"{name}_{'low' if lower else 'high'}") for name in baselines]
    if own is None or None in others:
        return None
    return own < min(others) if lower else own > max(others)

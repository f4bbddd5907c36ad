"""The evaluator: one call for every model and every benchmark, in training and after it."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from triptych.evaluation.baselines import permute_images
from triptych.evaluation.benchmark import Benchmark, Metrics, Record
from triptych.evaluation.gallery import write_gallery
from triptych.evaluation.planning import clusters_of, image_subset, plan
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.records import Results, read_answers, write_json, write_samples
from triptych.evaluation.scorers import Outcome, Scorer, choose
from triptych.types import DataError, Sample, TriptychError

BLIND_SIZE = 1000  # questions of the blind run unless blind="all"
BLIND_RULE = 0  # the seed by which a benchmark without a committed subset draws one


def evaluate(
    predictor: Predictor,
    benchmarks: dict[str, Benchmark],
    out: Path | None,
    *,
    limit: int | None = None,
    blind: str = "subset",
    seed: int = 0,
    progress: bool = True,
    before: Path | None = None,
) -> Results:
    """Score a model on benchmarks and leave results, times, records and galleries in `out`.

    limit: at most so many questions of each benchmark, all those of seeded images. blind: run
    again with permuted images on a fixed "subset" of 1,000 questions, on "all", or "none".
    seed draws the limited images, the permutation and the gallery. With out=None nothing is
    written. The outcome does not depend on the batch size. before: a folder that an earlier call
    wrote, whose answers stand beside the new ones in the gallery.
    """
    if blind not in ("subset", "all", "none"):
        raise TriptychError(f"eval.blind='{blind}' is unknown; use subset, all or none.")
    if limit is not None and limit < 1:
        raise TriptychError(f"eval.limit={limit} leaves no question; use 1 or more, or null.")
    runs = {}
    for name, benchmark in benchmarks.items():
        samples = _select(name, benchmark, limit, seed)
        runs[name] = _run(name, benchmark, predictor, samples, blind, seed, progress)
    metrics = {
        f"{name}/{key}": entry for name, run in runs.items() for key, entry in run.metrics.items()
    }
    results: Results = {"metrics": metrics}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results)
        timing = {name: run.timing for name, run in runs.items()}
        write_json(out / "timing.json", {"benchmarks": timing, **peak_memory()})
        records = [record for run in runs.values() for record in run.records]
        if before is not None:
            earlier = read_answers(before)
            for record in records:
                record["before"] = earlier.get((record["benchmark"], record["sample_id"]))
        write_samples(out / "samples.parquet", records)
        images = {s.id: s.images for run in runs.values() for s in run.samples}
        write_gallery(out, records, images, seed)
    return results


@dataclass
class _Run:
    samples: list[Sample]
    records: list[Record]
    metrics: Metrics
    timing: dict[str, Any]


def _run(
    name: str,
    benchmark: Benchmark,
    predictor: Predictor,
    samples: list[Sample],
    blind: str,
    seed: int,
    progress: bool,
) -> _Run:
    """One benchmark: the model, then the two baselines, judged by the same functions."""
    scorer = choose(benchmark.scorers, predictor, name)
    say = partial(print, flush=True) if progress else _silent
    say(f"{name}: {len(samples):,} questions, scorer {scorer.name}")
    for note in getattr(benchmark, "notes", ()):
        say(f"{name}: {note}")
    outcomes, timing = _ask(scorer, predictor, samples, name, progress)
    records = [benchmark.record(s, o) for s, o in zip(samples, outcomes, strict=True)]

    guesses: list[Record] = []
    if (prior := benchmark.prior) is not None:
        words = [prior.guess(sample) for sample in samples]
        guesses = [benchmark.record(s, Outcome(w, w)) for s, w in zip(samples, words, strict=True)]

    means_something = getattr(benchmark, "permuted", True)
    rows = _blind_rows(benchmark, samples, blind if means_something else "none")
    permuted = permute_images([samples[row] for row in rows], seed)
    seen: list[Record] = []
    if permuted:
        say(f"{name}: blind (images permuted) on {len(permuted):,} of them")
        outcomes, timing["blind"] = _ask(scorer, predictor, permuted, f"{name} blind", progress)
        seen = [benchmark.record(s, o) for s, o in zip(permuted, outcomes, strict=True)]

    metrics = _join(
        benchmark.metrics(records),
        prior=benchmark.metrics(guesses) if guesses else {},
        blind=benchmark.metrics(seen) if seen else {},
    )
    for entry in metrics.values():
        entry["scorer"] = scorer.name
    for record in records:
        record.update(benchmark=name, scorer=scorer.name, prior=None, blind=None)
    for record, guess in zip(records, guesses, strict=False):
        record["prior"] = guess["parsed"]
    for row, record in zip(rows, seen, strict=False):
        records[row]["blind"] = record["parsed"] or ""
    return _Run(samples, records, metrics, timing)


def _select(name: str, benchmark: Benchmark, limit: int | None, seed: int) -> list[Sample]:
    every = benchmark.samples
    if limit is not None and limit < len(every):
        samples = [every[i] for i in image_subset(clusters_of(every), limit, seed)]
    else:
        samples = [every[i] for i in range(len(every))]
    if not samples:
        raise DataError(f"benchmark '{name}' has no sample; check its data.")
    counts = Counter(sample.id for sample in samples)
    double = [key for key, count in counts.items() if count > 1]
    if double:
        raise DataError(
            f"benchmark '{name}' has {len(double)} sample ids more than once, the first is "
            f"'{double[0]}'; records are joined by id, so give each sample its own."
        )
    return samples


def _blind_rows(benchmark: Benchmark, samples: list[Sample], blind: str) -> list[int]:
    """Rows of the blind run: the committed ids if all are there, else drawn by a fixed rule."""
    if blind == "none":
        return []
    if blind == "all":
        return list(range(len(samples)))
    places = {sample.id: row for row, sample in enumerate(samples)}
    if benchmark.blind_ids and all(key in places for key in benchmark.blind_ids):
        return [places[key] for key in benchmark.blind_ids]
    return image_subset(clusters_of(samples), BLIND_SIZE, BLIND_RULE)


def _ask(
    scorer: Scorer, predictor: Predictor, samples: list[Sample], label: str, progress: bool
) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes in the order of the samples, and what they cost."""
    from tqdm import tqdm

    outcomes: list[Outcome | None] = [None] * len(samples)
    calls, tokens = predictor.vision_calls, predictor.generated_tokens
    start = time.perf_counter()
    with tqdm(total=len(samples), desc=label, unit="q", disable=not progress) as bar:
        whole = getattr(scorer, "whole", False)
        every = [list(range(len(samples)))]
        for rows in every if whole else plan(samples, predictor.batch_size):
            answers = scorer.ask(predictor, [samples[row] for row in rows])
            for row, outcome in zip(rows, answers, strict=True):
                outcomes[row] = outcome
            bar.update(len(rows))
    seconds = time.perf_counter() - start
    return outcomes, {
        "seconds": round(seconds, 3),
        "questions": len(samples),
        "questions_per_second": round(len(samples) / max(seconds, 1e-9), 2),
        "distinct_images": len({image.key for s in samples for image in s.images}),
        "vision_calls": predictor.vision_calls - calls,
        "generated_tokens": predictor.generated_tokens - tokens,
    }


def _join(metrics: Metrics, **baselines: Metrics) -> Metrics:
    """Write each baseline's value, interval and n beside the score of the same key."""
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


def peak_memory() -> dict[str, int]:
    """The most bytes this process ever held, in RAM and on the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _silent(text: str) -> None:
    """Say nothing."""

"""Compare runs on the same samples: python -m triptych.evaluation.compare RUN RUN ...

Runs are joined on sample ids. A difference has an interval that draws images, not questions, and a
p-value by flipping signs of whole images, corrected for the number of comparisons (Holm).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from triptych.evaluation.compare_runs import (
    EvaluatedRun,
    evaluate_sources,
    load_runs,
    split_key,
)
from triptych.evaluation.compare_tables import (
    difference_rows,
    headline,
    score_rows,
    text_table,
)
from triptych.evaluation.metrics import holm, paired_compare
from triptych.types import TriptychError

LOWER = ("cer", "wer", "perplexity", "bits_per_byte", "chair_s", "chair_i", "median_rank")
BETTER, WORSE, SAME, UNTESTED = "better", "worse", "no difference", "not tested"


@dataclass
class Difference:
    """How run `b` differs from run `a` in one metric, on the samples that both have.

    difference is b - a, with its 95 % interval; p is of these samples alone, p_holm corrected for
    all differences tested beside it. wins and losses are sample ids that only b, or only a, has
    right. verdict is b's.
    """

    metric: str
    a: str
    b: str
    n: int
    images: int = 0
    value_a: float | None = None
    value_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str = UNTESTED
    note: str = ""
    wins: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)


def compare(
    runs: Sequence[EvaluatedRun], alpha: float = 0.05, every_pair: bool = False
) -> list[Difference]:
    """All metrics of all runs against the first run, or of every pair.

    Runs of one recipe that differ in nothing but the seed are never called better or worse: what
    lies between them is the noise of training. A difference between recipes that is no larger than
    such noise, where it was measured, is none either. Headline metrics and slices are corrected
    apart.
    """
    if len(runs) < 2:
        raise TriptychError("give two runs or more; one alone has nothing to be compared with.")
    pairs = list(combinations(runs, 2)) if every_pair else [(runs[0], run) for run in runs[1:]]
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics))
    found = [
        _difference(key, a, b)
        for key in keys
        for a, b in pairs
        if key in a.metrics and key in b.metrics
    ]
    floors = {key: _seed_noise(key, runs) for key in keys}
    for sliced in (False, True):
        tested = [d for d in found if d.p is not None and bool(split_key(d.metric)[2]) == sliced]
        for row, corrected in zip(tested, holm([d.p for d in tested]), strict=True):
            row.p_holm = corrected
            _decide(row, alpha, floors[row.metric])
    recipes = {run.name: run for run in runs}
    for row in found:
        if _same_recipe(recipes[row.a], recipes[row.b]):
            row.verdict, row.note = SAME, "one recipe, other seed: this is the noise of training"
    return found


def _difference(key: str, a: EvaluatedRun, b: EvaluatedRun) -> Difference:
    left, right = a.samples(key), b.samples(key)
    both = [name for name in left if name in right]
    row = Difference(key, a.name, b.name, len(both))
    column = _column(key, a) and _column(key, b)
    values = [entry.get("value") for entry in (a.metrics[key], b.metrics[key])]
    if None not in values:
        row.value_a, row.value_b, row.difference = *values, values[1] - values[0]
    if not both or column is None:
        row.note = "the runs share no sample" if not both else "no value a sample is stored"
        return row
    odd = next((n for n in both if left[n].get("gold") != right[n].get("gold")), None)
    if odd is not None:
        raise TriptychError(
            f"sample '{odd}' of {key} has gold '{left[odd]['gold']}' in {a.name} and "
            f"'{right[odd]['gold']}' in {b.name}; rescore both with the same data."
        )
    both = [n for n in both if left[n].get(column) is not None and right[n].get(column) is not None]
    old, new = ([rows[n][column] for n in both] for rows in (left, right))
    made = paired_compare(new, old, [left[n]["cluster_id"] for n in both])
    row.value_a, row.value_b = sum(old) / len(old), sum(new) / len(new)
    row.n, row.images = made.n, made.clusters
    row.difference, row.p = made.difference, made.p
    if made.clusters > 1:  # one image says nothing about spread
        row.low, row.high = made.low, made.high
    row.wins = [n for n, x, y in zip(both, old, new, strict=True) if y > x]
    row.losses = [n for n, x, y in zip(both, old, new, strict=True) if y < x]
    rules = [run.metrics[key].get("scoring_hash") for run in (a, b)]
    notes = [] if len(set(rules)) == 1 else ["scored by other rules or on other samples"]
    alone = len(left) + len(right) - 2 * row.n
    notes += [f"{alone:,} samples are in one run only"] if alone else []
    row.note = "; ".join(notes)
    return row


def _column(key: str, run: EvaluatedRun) -> str | None:
    """The column whose mean over the samples is the metric; None for metrics of a whole corpus."""
    _, metric, _ = split_key(key)
    rows, value = list(run.samples(key).values()), run.metrics[key].get("value")
    for name in (metric, metric.removeprefix("accuracy_"), "correct"):
        held = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if held and value is not None and abs(sum(held) / len(held) - value) < 1e-5:
            return name
    return None


def _decide(row: Difference, alpha: float, floor: float) -> None:
    if row.p_holm is None or row.p_holm >= alpha or not row.difference:
        row.verdict = SAME
    elif abs(row.difference) <= floor:
        row.verdict = SAME
        row.note = f"no larger than what a seed makes here ({100 * floor:.2f})"
    else:
        lower = split_key(row.metric)[1] in LOWER
        row.verdict = BETTER if (row.difference > 0) != lower else WORSE


def _same_recipe(a: EvaluatedRun, b: EvaluatedRun) -> bool:
    known = "seed" in a.settings and "seed" in b.settings
    return known and a.settings["seed"] != b.settings["seed"] and a.recipe == b.recipe


def _seed_noise(key: str, runs: Sequence[EvaluatedRun]) -> float:
    """The largest difference of a metric between two seeds of one recipe, 0 where none is known."""
    held = [run for run in runs if run.metrics.get(key, {}).get("value") is not None]
    gaps = (
        abs(a.metrics[key]["value"] - b.metrics[key]["value"])
        for a, b in combinations(held, 2)
        if _same_recipe(a, b)
    )
    return max(gaps, default=0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Read runs, print both tables, write compare.html and compare.json."""
    from triptych.evaluation.compare_page import write_page
    from triptych.evaluation.records import write_json

    parser = argparse.ArgumentParser(prog="python -m triptych.evaluation.compare")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder, sweep, or wandb:ENTITY/PROJECT[/RUN]")
    add(
        "--benchmark",
        metavar="NAMES",
        help="evaluate first, as in easy_vqa,shapes; a RUN may then be a preset and bring options: "
        "'gpt4v:ID model.budget=null'",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="option of that evaluation")
    add("--out", default="compare", help="folder of compare.html and compare.json")
    add("--alpha", type=float, default=0.05, help="level of the corrected tests")
    add("--pairs", choices=["first", "all"], default="first", help="against the first, or all")
    add("--wandb", metavar="PROJECT", help="send both tables to this W&B project too")
    asked = parser.parse_args(argv)
    out = Path(asked.out)
    try:
        sources = asked.runs
        if asked.benchmark:
            sources = evaluate_sources(sources, asked.benchmark, asked.set, out)
        runs = load_runs(sources, out / "downloads")
        found = compare(runs, asked.alpha, asked.pairs == "all") if len(runs) > 1 else []
    except TriptychError as error:
        raise SystemExit(f"error: {error}") from None
    print(text_table(score_rows(runs)))
    if found:
        print("\n" + text_table(difference_rows([d for d in found if headline(d.metric)] or found)))
    for run in runs:
        for name, why in run.left_out.items():
            print(f"{run.name}: {name} was left out, {why}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", {"differences": [asdict(d) for d in found]})
    write_page(out / "compare.html", runs, found)
    if asked.wandb:
        _send(out, asked.wandb, runs, found)
    print(f"Comparison: {out / 'compare.html'}")


def _send(
    out: Path, project: str, runs: Sequence[EvaluatedRun], found: Sequence[Difference]
) -> None:
    from triptych.wandb_sink import WandbSink

    settings: dict[str, Any] = {"runs": [run.name for run in runs]}
    sink = WandbSink(out, settings, project=project, job_type="compare")
    try:
        sink.log_samples(score_rows(runs), name="scores")
        sink.log_samples(difference_rows(found), name="differences")
    finally:
        sink.finish()


if __name__ == "__main__":
    main(sys.argv[1:])

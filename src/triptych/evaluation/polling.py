"""POPE: F1 of "yes" a split, under its official parser, with the rate of what it had to guess."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from triptych.evaluation.benchmark import AnswerBenchmark, Metrics, Record, with_interval
from triptych.evaluation.metrics import auroc, parse_pope, pope_scores
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.evaluation.spread import with_spread
from triptych.evaluation.wording import Ask, Rank
from triptych.types import Sample

PARTS = ("accuracy", "precision", "recall", "yes_ratio")


class PopeBenchmark(AnswerBenchmark):
    """Yes or no, is the object there: accuracy, precision, recall, F1 and yes ratio of each split.

    `f1` is the mean of the splits' F1, as papers report it. The official parser takes everything
    but no and not for a "yes", the empty answer too; therefore `f1_strict` and `accuracy_strict`
    stand beside: there an answer that begins with neither yes nor no is `unparsed`, and wrong.
    `always_yes` is the F1 of the answer yes. A model that ranks adds `auroc`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        instruction: str = "",
        max_new_tokens: int = 16,
        scorers: Sequence[Scorer] | None = None,
    ) -> None:
        ways = [
            Ask(max_new_tokens, instruction=instruction),
            Rank(instruction=instruction),
            Similarity(),
        ]
        super().__init__(samples, train, slice_by="split", scorers=scorers or ways)

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row: `parsed` by the strict parser, `official` by the official one."""
        said = outcome.raw if outcome.parsed is None else outcome.parsed
        tied = bool(outcome.scores) and not said  # equal likelihoods say neither
        strict = None if tied else parse_pope(said, "strict")
        row = super().record(sample, Outcome(outcome.raw, strict, outcome.scores))
        official = None if tied else parse_pope(said)
        return row | {
            "parsed": strict,
            "correct": float(strict == row["gold"]),
            "official": official,
            "parser": "parse_pope/strict",
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """F1 first: the mean over splits, then every number of every split."""
        splits = {name: [r for r in records if r["slice"] == name] for name in _names(records)}
        made: Metrics = {}
        for key, said in (("f1", "official"), ("f1_strict", "parsed")):
            made[key] = _f1(records, splits, said)
            for name, rows in splits.items():
                made[f"{key}/{name}"] = _f1(rows, {name: rows}, said)
        for name, rows in {"": records, **splits}.items():
            made |= _parts(rows, f"/{name}" if name else "")
        return made


def _names(records: Sequence[Record]) -> list[str]:
    return sorted({record["slice"] for record in records})


def _f1(records: Sequence[Record], splits: dict[str, list[Record]], said: str) -> dict[str, Any]:
    """The mean of the splits' F1; bootstrapped from three sums a split."""
    rows = np.zeros((len(records), 3 * len(splits)))
    for i, record in enumerate(records):
        place = 3 * list(splits).index(record["slice"])
        yes, true = record[said] == "yes", record["gold"] == "yes"
        rows[i, place : place + 3] = (yes and true, yes, true)
    entry = with_spread(rows, records, partial(_mean_f1, splits=len(splits)))
    share = [fmean(r["gold"] == "yes" for r in part) for part in splits.values()]
    return entry | {
        "unparsed": fmean(r["parsed"] is None for r in records),
        "chance": fmean(s / (s + 0.5) for s in share),  # a coin: precision s, recall one half
        "always_yes": fmean(2 * s / (1 + s) for s in share),
        "parser": f"parse_pope/{'strict' if said == 'parsed' else 'official'}",
    }


def _mean_f1(sums: np.ndarray, splits: int) -> np.ndarray:
    """(..., 3 x splits) sums of hits, said and true -> (...) mean F1; 0 where nothing is yes."""
    parts = sums.reshape(*sums.shape[:-1], splits, 3)
    below = parts[..., 1] + parts[..., 2]
    return (2 * parts[..., 0] / np.where(below == 0, 1, below)).mean(-1)


def _parts(records: Sequence[Record], suffix: str) -> Metrics:
    labels = [record["gold"] for record in records]
    scores = pope_scores([record["official"] for record in records], labels)
    right = [float(record["official"] == record["gold"]) for record in records]
    unparsed = fmean(record["parsed"] is None for record in records)
    most = max(labels.count("yes"), labels.count("no")) / len(labels)
    made: Metrics = {
        f"accuracy{suffix}": with_interval(right, records),
        f"accuracy_strict{suffix}": with_interval([r["correct"] for r in records], records),
    }
    for entry in made.values():
        entry |= {"unparsed": unparsed, "chance": 0.5, "majority": most}
    for name in PARTS[1:]:
        made[f"{name}{suffix}"] = {"value": scores[name], "n": len(records)} | _NO_INTERVAL
    if all(record.get("scores") for record in records) and len(set(labels)) == 2:
        margins = [record["scores"][0] - record["scores"][1] for record in records]  # yes, no
        made[f"auroc{suffix}"] = {"value": auroc(margins, labels), "n": len(records)} | _NO_INTERVAL
        made[f"auroc{suffix}"]["chance"] = 0.5
    return made


_NO_INTERVAL = {"low": None, "high": None, "chance": None}

"""The benchmarks of models that embed: retrieval, zero-shot classification and the linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from statistics import fmean, median
from typing import Any

import numpy as np

from triptych.evaluation.benchmark import AnswerBenchmark, Metrics, Record, with_interval
from triptych.evaluation.matching import MatchRetrieve
from triptych.evaluation.metrics import topk_hits
from triptych.evaluation.metrics.retrieval import RETRIEVAL_RULE
from triptych.evaluation.retrieving import KS, Retrieve
from triptych.evaluation.scorers import Generate, Likelihood, Outcome, Scorer
from triptych.evaluation.similarity import ClassSimilarity, Probe
from triptych.types import Sample

RECALLS = [f"{side}_r{k}" for side in ("i2t", "t2i") for k in KS]


class RetrievalBenchmark:
    """R@1, 5 and 10 from image to text (any caption counts) and from text to image.

    samples: one an image-caption pair; pairs of one image share its key. Every value has its chance
    and the ceiling that equal captions of different images leave. Ties count by expectation. A
    model with a match head re-ranks its shortlists; `eval.scorer=all` adds the cosine alone.
    fold_size: the same again within folds of so many images, averaged over the folds, under keys
    that end in it (`i2t_r1_1k` for 1,000: the COCO 1k test); the samples have to fill two of them.
    """

    prior = None
    permuted = False  # a gallery whose images are permuted is another gallery; chance stands beside

    def __init__(
        self,
        samples: Sequence[Sample],
        scorers: Sequence[Scorer] | None = None,
        fold_size: int | None = None,
    ) -> None:
        self.samples, self.blind_ids, self.fold_size = samples, [], fold_size
        ways = [MatchRetrieve(fold_size), Retrieve(fold_size)]
        self.scorers = list(scorers) if scorers else ways

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row a caption: the image it finds first, and what both directions hit."""
        return {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.images[0].key,
            "image": sample.images[0].name,
            "question": sample.text,
            "gold": sample.images[0].name,
            "raw_output": outcome.raw,
            "parsed": outcome.raw,
            "correct": outcome.extra["t2i_r1"],
            "slice": "",
            **outcome.extra,
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """The six recalls with intervals by image, and their mean; then those within folds."""
        made = _with_mean({key: _recall(records, key) for key in RECALLS}, records)
        folds: dict[int, list[Record]] = {}
        for record in records:
            if record.get("fold") is not None:
                folds.setdefault(record["fold"], []).append(record)
        if self.fold_size is None or not folds:
            return made
        parts, size = list(folds.values()), self.fold_size
        within = {key: _over_folds(parts, key) for key in RECALLS}
        within = _with_mean(within, [record for part in parts for record in part])
        ending = f"{size // 1000}k" if size % 1000 == 0 else str(size)
        return made | {f"{key}_{ending}": entry for key, entry in within.items()}


def _recall(records: Sequence[Record], key: str, prefix: str = "") -> dict[str, Any]:
    """One recall of one direction, such as i2t_r5, from the rows that asked in it."""
    side, name = key.split("_")[0], prefix + key
    rows = [record for record in records if record[f"{prefix}{side}_rank"] is not None]
    return with_interval([row[name] for row in rows], rows) | {
        "chance": fmean(row[f"{name}_chance"] for row in rows),
        "ceiling": fmean(row[f"{name}_ceiling"] for row in rows),
        "median_rank": median(row[f"{prefix}{side}_rank"] for row in rows),
        "rule": RETRIEVAL_RULE,
    }


def _over_folds(folds: Sequence[Sequence[Record]], key: str) -> dict[str, Any]:
    """The mean over folds. No image is in two, so their errors add up as independent ones do."""
    entries = [_recall(fold, key, "fold_") for fold in folds]
    made = {part: fmean(e[part] for e in entries) for part in ("chance", "ceiling", "median_rank")}
    value, count = fmean(entry["value"] for entry in entries), len(entries)
    return made | {
        "value": value,
        "n": sum(entry["n"] for entry in entries),
        "low": value - hypot(*(e["value"] - e["low"] for e in entries)) / count,
        "high": value + hypot(*(e["high"] - e["value"] for e in entries)) / count,
        "folds": [round(entry["value"], 6) for entry in entries],
        "rule": f"{RETRIEVAL_RULE}, mean of folds",
    }


def _with_mean(recalls: Metrics, records: Sequence[Record]) -> Metrics:
    parts = ("value", "chance", "ceiling")
    mean = {part: fmean(entry[part] for entry in recalls.values()) for part in parts}
    return recalls | {"mean_recall": mean | {"n": len(records), "low": None, "high": None}}


class ZeroShotBenchmark(AnswerBenchmark):
    """Classification among `Sample.candidates` with nothing trained: top-1, top-5 and mean recall.

    templates: prompts with {} for the class, averaged as one ensemble. A generative model answers
    by likelihood, or in words.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        templates: Sequence[str] = ("a photo of a {}.",),
        train: Sequence[Sample] | None = None,
        scorers: Sequence[Scorer] | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        ways = [ClassSimilarity(tuple(templates)), Likelihood(), Generate(max_new_tokens)]
        super().__init__(samples, train, scorers=scorers or ways)

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        row = super().record(sample, outcome) | {"label": sample.candidates.index(sample.target)}
        if outcome.scores:
            scores, label = np.array([outcome.scores]), [row["label"]]
            row["correct"], row["top5"] = (float(topk_hits(scores, label, k)[0]) for k in (1, 5))
        return row

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """acc1, acc5 where there are five classes, and recall averaged over classes."""
        made = super().metrics(records)
        classes = min(r["candidates"] for r in records)
        ranked = all("top5" in r for r in records)
        if classes >= 5 and ranked:
            made["accuracy_top5"] = with_interval([r["top5"] for r in records], records)
            made["accuracy_top5"]["chance"] = 5 / classes
        made["mean_class_recall"] = _class_recall(records)
        return made


class ProbeBenchmark(AnswerBenchmark):
    """A linear classifier on frozen image vectors; `train` and `samples` are labelled images.

    c: inverse regularisation; null chooses it on a fifth of every class of `train`.
    """

    permuted = False

    def __init__(
        self, samples: Sequence[Sample], train: Sequence[Sample], c: float | None = 0.316
    ) -> None:
        super().__init__(samples, scorers=[Probe(train, c)])

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        classes = sorted(set(sample.candidates) | {str(sample.target)})
        facts = {**outcome.extra, "label": classes.index(str(sample.target))}
        return super().record(sample, outcome) | facts

    def metrics(self, records: Sequence[Record]) -> Metrics:
        made = super().metrics(records) | {"mean_class_recall": _class_recall(records)}
        for entry in made.values():
            entry |= {"c": records[0]["c"], "recipe": records[0]["recipe"]}
        return made


def _class_recall(records: Sequence[Record]) -> dict[str, Any]:
    labels = np.array([r["label"] for r in records])
    by_class = [
        fmean(r["correct"] for r in np.array(records, object)[labels == label])
        for label in np.unique(labels)
    ]
    return {"value": fmean(by_class), "n": len(records), "low": None, "high": None, "chance": None}

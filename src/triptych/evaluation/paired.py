"""Paired sets: two captions that differ in a word or an order; a win must be strict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from triptych.evaluation.benchmark import Metrics, Record, with_interval
from triptych.evaluation.choice import ChoiceBenchmark
from triptych.evaluation.metrics import paired_selection
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.evaluation.wording import AskLetter, Rank
from triptych.types import Sample

WHICH = "Which caption fits the image? Answer with its letter directly."


class PairedBenchmark(ChoiceBenchmark):
    """Accuracy of the caption that fits, by meta[slice_by], and the mean over those slices.

    Scorers: the cosine of image and caption, the likelihood of the caption, or generation of its
    letter. Equal scores are lost. A language model may know which caption is the likelier sentence:
    read the score against `blind`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        slice_by: str,
        rule: str = "standard",
        scorers: Sequence[Scorer] | None = None,
    ) -> None:
        ways = [Similarity("{answer}"), Rank(), AskLetter(instruction=WHICH)]
        super().__init__(samples, rule=rule, scorers=scorers or ways)
        self.slice_by = slice_by

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        row = super().record(sample, outcome)
        return row | {"slice": str(sample.meta.get(self.slice_by, "other"))}

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Accuracy over all pairs, of each slice, and `macro_accuracy`, the slices' mean."""
        slices = {name: [r for r in records if r["slice"] == name] for name in _slices(records)}
        made = super().metrics(records)
        made |= {f"accuracy/{name}": _strict(rows) for name, rows in slices.items()}
        made["accuracy"] |= {"rule": "strict"}
        means = [made[f"accuracy/{name}"]["value"] for name in slices]
        plain = {"n": len(records), "low": None, "high": None, "chance": 0.5, "rule": "strict"}
        made["macro_accuracy"] = {"value": float(np.mean(means)), **plain}
        return made


class WinogroundBenchmark(PairedBenchmark):
    """Text, image and group score of Winoground (Thrush et al. 2022), section 3.1.

    text: both images prefer their own caption; image: both captions prefer their own image; group:
    both. A model that only writes has no score of a pair, so it gets `text` alone. Items of which
    an image is missing (cut by a limit) are left out.
    """

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        return super().record(sample, outcome) | {"side": sample.meta["image"]}

    def metrics(self, records: Sequence[Record]) -> Metrics:
        pairs: dict[str, dict[int, Record]] = {}
        for record in records:
            pairs.setdefault(record["group"], {})[record["side"]] = record
        items = [(pair[0], pair[1]) for pair in pairs.values() if len(pair) == 2]
        slices = {"": items}
        for name in _slices(records):
            slices[f"/{name}"] = [item for item in items if item[0]["slice"] == name]
        made: Metrics = {}
        for key, wins, chance in (("group", _group, 1 / 6), ("text", _text, 1 / 4)) + _IMAGE:
            for suffix, some in slices.items():
                if some and (key == "text" or all(r.get("scores") for i in some for r in i)):
                    made[f"{key}{suffix}"] = _entry(some, wins, chance)
        return made


Item = tuple[Record, Record]


def _text(item: Item) -> float:
    return float(all(record["correct"] for record in item))


def _image(item: Item) -> float:
    return paired_selection([[record["scores"] for record in item]])["image"]


def _group(item: Item) -> float:
    return paired_selection([[record["scores"] for record in item]])["group"]


_IMAGE = (("image", _image, 1 / 4),)


def _entry(items: list[Item], wins: Callable[[Item], float], chance: float) -> dict[str, Any]:
    records = [item[0] for item in items]
    lost = sum(record["parsed"] is None for item in items for record in item)
    return with_interval([wins(item) for item in items], records) | {
        "unparsed": lost / (2 * len(items)),
        "chance": chance,
        "rule": "strict",
    }


def _strict(records: Sequence[Record]) -> dict[str, Any]:
    return with_interval([record["correct"] for record in records], records) | {
        "unparsed": sum(record["parsed"] is None for record in records) / len(records),
        "chance": 0.5,
        "rule": "strict",
    }


def _slices(records: Sequence[Record]) -> list[str]:
    return sorted({record["slice"] for record in records})

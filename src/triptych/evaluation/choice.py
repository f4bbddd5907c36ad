"""Multiple choice: the letter of the right option, and every rotation of it (CircularEval)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from triptych.evaluation.baselines import question_of
from triptych.evaluation.benchmark import AnswerBenchmark, Metrics, Record, with_interval
from triptych.evaluation.metrics import circular_accuracy, letter_report, parse_choice
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.evaluation.wording import AskLetter, RankLetter, letters_of
from triptych.types import Sample, TriptychError


class ChoiceBenchmark(AnswerBenchmark):
    """Accuracy of chosen options; `meta["slices"]` are its slices.

    samples: options in `candidates`, the right one as `target`. Accepted scorers: the likelihood of
    the letters, generation under lettered options, read by `rule` of `parse_choice`, and the
    similarity of "question option". An answer from which no letter can be read is wrong and counted
    as `unparsed`. `letters` shows the share of each chosen letter, beside it the accuracy by gold.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        rule: str = "standard",
        max_new_tokens: int = 16,
        scorers: Sequence[Scorer] | None = None,
        blind_subset: str | None = None,
    ) -> None:
        ways = [RankLetter(), AskLetter(max_new_tokens), Similarity()]
        super().__init__(samples, train, scorers=scorers or ways, blind_subset=blind_subset)
        self.rule = rule
        parse_choice("A", ["a", "b"], rule)  # an unknown rule is refused before any model runs

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row: the letter read from the outcome, and whether it is that of the right option."""
        options = letters_of(sample)
        gold = _letter(options, str(sample.target))
        if gold is None:
            raise TriptychError(f"sample '{sample.id}' has a target that is none of its options.")
        if outcome.parsed is not None:
            parsed = _letter(options, outcome.parsed)
        else:  # a tie of scores comes as an empty text, which names nothing
            parsed = parse_choice(outcome.raw, options, self.rule)
        right = parsed is not None and options[parsed] == options[gold]
        return {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.id,
            "group": sample.group or sample.id,
            "rotation": int(sample.meta.get("rotation", 0)),
            "image": ", ".join(image.name for image in sample.images),
            "question": question_of(sample),
            "gold": gold,
            "options": list(options.values()),
            "candidates": len(options),
            "raw_output": outcome.raw,
            "parsed": parsed,
            "correct": float(right),
            "parser": f"parse_choice/{self.rule}",
            "slice": "",
            "tags": list(sample.meta.get("slices", ())),
            **({"scores": outcome.scores} if outcome.scores else {}),
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Accuracy of all records and of the records of each tag."""
        return {"accuracy": _accuracy(records)} | _by_tag("accuracy", records, _accuracy)


class CircularBenchmark(ChoiceBenchmark):
    """CircularEval (MMBench): a question is right if all rotations of its options are answered so.

    samples: one a rotation, tied by `group`, meta["rotation"] from 0. `accuracy` is the first pass
    alone. The chance of `circular_accuracy` is that of a guess at every rotation. Questions that a
    limit has cut into are left out of it.
    """

    def metrics(self, records: Sequence[Record]) -> Metrics:
        first = [record for record in records if record["rotation"] == 0]
        made = {}
        if whole := _whole(records):
            made["circular_accuracy"] = _circular(whole)
            made |= _by_tag("circular_accuracy", whole, _circular)
        return made | ({"accuracy": _accuracy(first)} if first else {})


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    letters = letter_report([r["parsed"] for r in records], [r["gold"] for r in records])
    return with_interval([record["correct"] for record in records], records) | {
        "unparsed": _unparsed(records),
        "chance": fmean(1 / record["candidates"] for record in records),
        "majority": max(sum(r["gold"] == g for r in records) for g in letters["accuracy"])
        / len(records),
        "letters": {str(k): round(v, 6) for k, v in letters["chosen"].items()},
        "accuracy_by_gold": {str(k): round(v, 6) for k, v in letters["accuracy"].items()},
        "parser": records[0]["parser"],
    }


def _circular(records: Sequence[Record]) -> dict[str, Any]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    rows = [passes[0] for passes in groups.values()]
    right = [float(all(r["correct"] for r in passes)) for passes in groups.values()]
    entry = with_interval(right, rows)
    known = circular_accuracy(records)
    return entry | {
        "value": known["circular"],
        "unparsed": _unparsed(records),
        "chance": fmean((1 / r["candidates"]) ** r["candidates"] for r in rows),
        "parser": rows[0]["parser"],
        "rule": "all-rotations",
    }


def _by_tag(key: str, records: Sequence[Record], judge: Any) -> Metrics:
    tags = sorted({tag for record in records for tag in record["tags"]})
    having = {tag: [r for r in records if tag in r["tags"]] for tag in tags}
    return {f"{key}/{tag.replace('/', '_')}": judge(rows) for tag, rows in having.items()}


def _whole(records: Sequence[Record]) -> list[Record]:
    """The records of questions of which every rotation is there."""
    turns: dict[str, set[int]] = {}
    for record in records:
        turns.setdefault(record["group"], set()).add(record["rotation"])
    return [r for r in records if len(turns[r["group"]]) == r["candidates"]]


def _unparsed(records: Sequence[Record]) -> float:
    return fmean(record["parsed"] is None for record in records)


def _letter(options: dict[str, str], text: str) -> str | None:
    return next((letter for letter, option in options.items() if option == text), None)

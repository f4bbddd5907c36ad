"""The five abilities as benchmarks; `benchmark=card` runs them all.

One that a model has no way to do is left out of its results and stands as "n/a" on its card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from triptych.data.scenes import COLORS, SHAPES, WORDS
from triptych.data.shapes_text import NUMBERS
from triptych.evaluation.benchmark import AnswerBenchmark, Metrics, Record, with_interval
from triptych.evaluation.card.scorers import Choose, Describe, ImageGain
from triptych.evaluation.matching import Match
from triptych.evaluation.metrics import cer, cider_d, pope_scores, ptb_tokenize
from triptych.evaluation.metrics.ptb import tokenizer_name
from triptych.evaluation.metrics.stats import clustered_bootstrap
from triptych.evaluation.parsers import exact_answer, mentioned_answer, normalize_answer
from triptych.evaluation.scorers import Generate, Likelihood, Outcome, Scorer
from triptych.evaluation.similarity import Similarity
from triptych.types import Sample

_TAG = re.compile(
    rf"\b({'|'.join(COLORS)}|grey)\s+({'|'.join(SHAPES)}|crosse)(?=s?\b)", re.IGNORECASE
)
_DIGITS = {str(i): word for i, word in enumerate(NUMBERS)} | {"none": "zero", "no": "zero"}


def card_answer(text: str, candidates: Sequence[str] = ()) -> str | None:
    """The one candidate the text mentions; digits count as their words where numbers are asked."""
    if set(NUMBERS) <= set(candidates):
        text = " ".join(_DIGITS.get(w.strip(".,!"), w) for w in text.lower().split())
    return mentioned_answer(text, candidates)


def read_word(text: str, candidates: Sequence[str] = ()) -> str | None:
    """The one word of the list that the text mentions, else the text itself: a misread word."""
    return mentioned_answer(text, WORDS) or exact_answer(text)


class Graded(AnswerBenchmark):
    """Closed answers, sliced by kind and by grade.

    scorers: matching, then free generation, then likelihood, then similarity.
    """

    reader: Callable = staticmethod(card_answer)

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        scorers: Sequence[Scorer] | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        ways = scorers or self.ways(max_new_tokens)
        super().__init__(samples, train, parser=self.reader, scorers=ways)

    def ways(self, max_new_tokens: int) -> list[Scorer]:
        """The accepted scorers in their order."""
        return [Match(), Generate(max_new_tokens), Likelihood(), Similarity()]

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row, with the kind as its slice and the grade beside it."""
        row = super().record(sample, outcome)
        return row | {"slice": sample.meta["kind"], "grade": sample.meta["grade"]}

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Accuracy of all, of each kind if there are several, and of each grade."""
        made = super().metrics(records)
        kinds = {record["slice"] for record in records}
        if len(kinds) == 1:
            del made[f"accuracy/{kinds.pop()}"]
        for grade in dict.fromkeys(record["grade"] for record in records):
            rows = [record | {"slice": ""} for record in records if record["grade"] == grade]
            made[f"accuracy/{grade}"] = super().metrics(rows)["accuracy"]
        return made


class Reading(Graded):
    """Words in pictures: accuracy, and the character error rate of what was written."""

    reader = staticmethod(read_word)

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Adds `cer`, over models that write; the lower the better."""
        made = super().metrics(records)
        if not any("scores" in record for record in records):
            said = [record["parsed"] or "" for record in records]
            rate = cer(said, [record["gold"] for record in records])
            made["cer"] = {"value": rate, "n": len(records), "low": None, "high": None}
        return made


class Hallucination(Graded):
    """Is it there? Accuracy, with F1 and the share of "yes" that shows a bias."""

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Adds `f1` and `yes_ratio`; one half of the questions are to be answered "yes"."""
        made = super().metrics(records)
        said = [r["parsed"] for r in records]
        scores = pope_scores(said, [r["gold"] for r in records])
        made["f1"] = {"value": scores["f1"], "n": len(records), "low": None, "high": None}
        yes = with_interval([float(answer == "yes") for answer in said], records)
        made["yes_ratio"] = yes
        return made


class Retrieval(Graded):
    """Which of ten captions belongs to the picture: recall at 1, the same for every family."""

    def ways(self, max_new_tokens: int) -> list[Scorer]:
        return [Match(), Similarity(), ImageGain(), Choose()]


class Generation(Graded):
    """Captions, judged by the objects they name: F1, invented objects (CHAIR) and CIDEr-D."""

    def ways(self, max_new_tokens: int) -> list[Scorer]:
        return [Describe(max(48, max_new_tokens)), Generate(max(48, max_new_tokens))]

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row; `correct` where the caption names exactly the objects that are there."""
        named, there = Counter(named_objects(outcome.raw)), Counter(sample.meta["there"])
        hits, total = (named & there).total(), named.total() + there.total()
        f1 = 2 * hits / total
        return super().record(sample, outcome) | {
            "parsed": normalize_answer(outcome.raw) or None,
            "correct": float(f1 == 1),
            "object_f1": f1,
            "mentions": named.total(),
            "invented": sorted((named - there).elements()),
            "missed": sorted((there - named).elements()),
            "references": sample.meta["references"],
            "parser": "named_objects",
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """`object_f1` with its grades, `chair_i`, `chair_s`, `words` a caption and `cider_d`."""
        clusters = [record["cluster_id"] for record in records]
        made: Metrics = {"object_f1": with_interval([r["object_f1"] for r in records], records)}
        made["object_f1"]["unparsed"] = fmean(r["parsed"] is None for r in records)
        for grade in dict.fromkeys(record["grade"] for record in records):
            rows = [record for record in records if record["grade"] == grade]
            made[f"object_f1/{grade}"] = with_interval([r["object_f1"] for r in rows], rows)
        pairs = np.array([[len(r["invented"]), r["mentions"]] for r in records], float)
        value, low, high = clustered_bootstrap(pairs, clusters, _share)
        made["chair_i"] = {"value": value, "n": len(records), "low": low, "high": high}
        made["chair_s"] = with_interval([float(bool(r["invented"])) for r in records], records)
        words = [len(r["raw_output"].split()) for r in records]
        for entry in (made["chair_i"], made["chair_s"]):
            entry["words"] = fmean(words)
        made["cider_d"] = _cider(records)
        return made


def named_objects(caption: str) -> list[str]:
    """The colour-and-shape names in a caption, one entry a mention: "two red circles" is one."""
    found = _TAG.findall(caption.lower())
    return [f"{c.replace('grey', 'gray')} {s.replace('crosse', 'cross')}" for c, s in found]


def _share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _cider(records: Sequence[Record]) -> dict:
    said = ptb_tokenize({r["sample_id"]: r["raw_output"] for r in records})
    references = ptb_tokenize({r["sample_id"]: r["references"] for r in records})
    facts = {"n": len(records), "low": None, "high": None, "tokenizer": tokenizer_name()}
    return {"value": cider_d(said, references)[0], **facts}

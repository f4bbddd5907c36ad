"""Reading: character and word error rates over all pictures (lower is better), and exact words."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from triptych.evaluation.answers import ScoredBenchmark
from triptych.evaluation.baselines import question_of
from triptych.evaluation.benchmark import Metrics, Record
from triptych.evaluation.metrics import RULES, edit_counts
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.spread import with_spread
from triptych.types import Sample


class ReadingBenchmark(ScoredBenchmark):
    """CER and WER, all edits over all symbols; an empty answer costs every symbol it left unread.

    samples: the words as `target`. Blanks around an answer and runs of them do not count; letters
    are composed first (NFC). slice_by names a field of meta, such as the level of difficulty.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        slice_by: str | None = None,
        instruction: str = "",
        max_new_tokens: int = 64,
        scorers: Sequence[Scorer] | None = None,
    ) -> None:
        super().__init__(
            samples,
            _same,
            "accuracy",
            "exact-nfc",
            train,
            slice_by,
            instruction,
            max_new_tokens,
            scorers,
        )

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row with its edits and symbols, so that a corpus can be summed."""
        said = " ".join((outcome.raw if outcome.parsed is None else outcome.parsed).split())
        gold = str(sample.target)
        characters, words = edit_counts(said, gold), edit_counts(said, gold, "word")
        return {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.id,
            "image": ", ".join(image.name for image in sample.images),
            "question": question_of(sample),
            "gold": gold,
            "answers": [gold],
            "candidates": 0,
            "raw_output": outcome.raw,
            "parsed": said or None,
            "correct": _same(said, [gold]),
            "edits": characters.edits,
            "symbols": characters.symbols,
            "word_edits": words.edits,
            "words": words.symbols,
            "parser": "stripped",
            "slice": str(sample.meta.get(self.slice_by, "other")) if self.slice_by else "",
        }

    def metrics(self, records: Sequence[Record]) -> Metrics:
        slices = sorted({record["slice"] for record in records} - {""})
        parts = {f"/{name}": [r for r in records if r["slice"] == name] for name in slices}
        made: Metrics = {}
        for suffix, rows in {"": list(records), **parts}.items():
            made[f"cer{suffix}"] = _rate(rows, "edits", "symbols", "cer")
            made[f"wer{suffix}"] = _rate(rows, "word_edits", "words", "wer")
            made[f"accuracy{suffix}"] = self._entry(rows)
        return made


def _rate(records: Sequence[Record], edits: str, symbols: str, rule: str) -> dict[str, Any]:
    rows = [[record[edits], record[symbols]] for record in records]
    return with_spread(rows, records, _ratio) | {
        "better": "lower",
        "unparsed": sum(record["parsed"] is None for record in records) / len(records),
        "chance": None,
        "rule": RULES[rule][0],
    }


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _same(text: str, answers: Sequence[str]) -> float:
    plain = unicodedata.normalize("NFC", " ".join(text.split()))
    return float(any(plain == unicodedata.normalize("NFC", answer) for answer in answers))

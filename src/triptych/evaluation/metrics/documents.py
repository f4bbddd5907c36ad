"""Metrics of documents, charts and reading: ANLS, relaxed accuracy, CER and WER."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from triptych.evaluation.metrics._shared import choose, mistake

ANLS_RULE = "rrc-0.5-nfc"
RELAXED_RULE = "relaxed-5%-stripped"
EDIT_UNITS = ("char", "word")


def _answers(answers: str | Sequence[str], metric: str) -> list[str]:
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers:
        raise mistake(f"{metric}: the list of gold answers is empty; give at least one.")
    return answers


def anls(prediction: str, answers: str | Sequence[str]) -> float:
    """Average Normalised Levenshtein Similarity of one answer, best over its gold answers.

    The Robust Reading rule (Biten et al. 2019): edits between the lower-cased texts with
    blanks collapsed, divided by the longer RAW text; similarities below 0.5 count 0, 0.5 itself
    counts. Texts are composed (NFC) first, so that decomposed Hangul costs nothing. Two empty
    texts score 1.
    """
    from rapidfuzz.distance import Levenshtein

    prediction = unicodedata.normalize("NFC", prediction)
    nearest = 1.0
    for answer in _answers(answers, "anls"):
        answer = unicodedata.normalize("NFC", answer)
        edits = Levenshtein.distance(
            " ".join(answer.lower().split()), " ".join(prediction.lower().split())
        )
        # the official script measures upper-cased texts, and upper() can lengthen one ("ß")
        length = max(len(answer.upper()), len(prediction.upper()))
        nearest = min(nearest, edits / length if length else 0.0)
    return 1.0 - nearest if 1.0 - nearest >= 0.5 else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, target: str | Sequence[str]) -> float:
    """1.0 if a number lies within 5 % of the target or the texts are equal, best over targets.

    ChartQA (Masry et al. 2022, section 5.1). "%" divides by 100; a target of zero, "1,000", "$5" or
    "5명" is compared as text, case-blind. Both sides are stripped. Binary floats decide at the
    edge (2.0 against 2.1 is wrong), as in the public implementations.
    """
    prediction = prediction.strip()
    return float(
        any(_relaxed(prediction, gold.strip()) for gold in _answers(target, "relaxed_accuracy"))
    )


def _relaxed(prediction: str, target: str) -> bool:
    p, t = _number(prediction), _number(target)
    if p is not None and t:
        return abs(p - t) / abs(t) <= 0.05
    return prediction.lower() == target.lower()


class Edits(NamedTuple):
    """Edits and the symbols of the reference, kept apart so that a corpus can be summed."""

    edits: int
    symbols: int


def edit_counts(prediction: str, reference: str, unit: str = "char") -> Edits:
    """Count the edits of one text, in code points (`char`) or blank-separated words (`word`).

    Both texts are composed (NFC) and stripped; among words, runs of blanks count as one.
    """
    from rapidfuzz.distance import Levenshtein

    choose(unit, EDIT_UNITS, "edit_counts")
    texts = [unicodedata.normalize("NFC", t).strip() for t in (prediction, reference)]
    left, right = texts if unit == "char" else [t.split() for t in texts]
    return Edits(Levenshtein.distance(left, right), len(right))


def _error_rate(
    predictions: str | Sequence[str], references: str | Sequence[str], unit: str, metric: str
) -> float:
    if isinstance(predictions, str):
        predictions = [predictions]
    references = _answers(references, metric)
    if len(predictions) != len(references):
        raise mistake(
            f"{metric}: {len(predictions)} predictions for {len(references)} references; "
            "pass one prediction a reference, an empty one where the model said nothing."
        )
    counts = [edit_counts(p, r, unit) for p, r in zip(predictions, references, strict=True)]
    return sum(c.edits for c in counts) / max(1, sum(c.symbols for c in counts))


def cer(predictions: str | Sequence[str], references: str | Sequence[str]) -> float:
    """Character error rate of a corpus: all edits / all reference characters; can pass 1.

    Never a mean of rates. If the references hold no character, the number of edits is returned.
    """
    return _error_rate(predictions, references, "char", "cer")


def wer(predictions: str | Sequence[str], references: str | Sequence[str]) -> float:
    """Word error rate of a corpus: all edits / all reference words; can pass 1.

    Never a mean of rates. If the references hold no word, the number of edits is returned.
    """
    return _error_rate(predictions, references, "word", "wer")

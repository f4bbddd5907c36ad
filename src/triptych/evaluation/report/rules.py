"""Why did it fail? Rules over a record; each names its hypothesis and what supports it.

They are hypotheses: what the record shows is true, that it is the cause is not proven.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triptych.data.scenes import COLORS, SHAPES, SMALL
from triptych.data.shapes_text import NUMBERS
from triptych.evaluation.metrics import anls, wilson
from triptych.evaluation.parsers import normalize_answer
from triptych.types import Sample

Record = Mapping[str, Any]
YES_NO = {"yes", "no"}
_NUMBERS = {word: i for i, word in enumerate((*NUMBERS, "five", "six", "seven", "eight", "nine"))}
_SMALL_AREA = (2 * SMALL) ** 2  # of the picture, as the scenes call an object small


@dataclass
class Case:
    """A failure: its record, its sample if the data are there, and the boxes known of it."""

    record: Record
    sample: Sample | None = None
    areas: Mapping[str, float] = field(default_factory=dict)  # object -> share of the picture

    @property
    def gold(self) -> str:
        return normalize_answer(str(self.record.get("gold") or ""))

    @property
    def answer(self) -> str:
        parsed = self.record.get("parsed")
        return normalize_answer(str(self.record.get("raw_output") if parsed is None else parsed))

    @property
    def question(self) -> str:
        return str(self.record.get("question") or "")


@dataclass(frozen=True)
class Lean:
    """How a benchmark's yes-or-no questions were answered, and how they should have been."""

    said: int = 0  # "yes"
    asked: int = 0
    right: float = 0.5  # share whose gold answer is "yes"

    @classmethod
    def of(cls, records: Sequence[Record]) -> Lean:
        gold = [normalize_answer(str(r["gold"])) for r in records]
        rows = [(r, g) for r, g in zip(records, gold, strict=True) if g in YES_NO]
        said = sum(r.get("parsed") == "yes" for r, _ in rows)
        return cls(said, len(rows), sum(g == "yes" for _, g in rows) / max(1, len(rows)))

    def toward(self) -> str | None:
        """The answer that is given clearly too often, by its 95 % interval."""
        if not self.asked:
            return None
        _, low, high = wilson(self.said, self.asked)
        return "yes" if low > self.right else "no" if high < self.right else None


Rule = Callable[[Case, Lean], str | None]


def format_of(case: Case, lean: Lean) -> str | None:
    """The words are right and the parser could not read them."""
    raw = normalize_answer(str(case.record.get("raw_output") or ""))
    if not case.gold or raw == case.gold or case.record.get("parsed") is not None:
        return None
    digits = " ".join(_DIGITS.get(word, word) for word in re.findall(r"\w+", raw))
    gold = rf"(?<!\w){re.escape(case.gold)}(?!\w)"
    if re.search(gold, raw) or re.search(gold, digits):
        return f'the text holds "{case.gold}", and the parser {_parser(case)} read no answer in it'
    return None


def language_prior(case: Case, lean: Lean) -> str | None:
    """The same is said without the picture."""
    blind, prior = (_said(case.record.get(name)) for name in ("blind", "prior"))
    if blind is None or not blind or blind != case.answer:
        return None
    also = ", which is also the most frequent answer to this question" if prior == blind else ""
    return f'shown another image, the model says "{blind}" too{also}'


def yes_bias(case: Case, lean: Lean) -> str | None:
    """One of yes and no is said too often, and here wrongly."""
    toward = lean.toward()
    if case.gold not in YES_NO or case.answer != toward or case.answer == case.gold:
        return None
    share = lean.said / lean.asked
    return (
        f'it leans to "{toward}": it says "yes" to {100 * share:.0f} % of {lean.asked:,} '
        "yes-or-no questions, and "
        f"{100 * lean.right:.0f} % are to be answered so"
    )


def counting(case: Case, lean: Lean) -> str | None:
    """A wrong number."""
    gold, said = (_NUMBERS.get(_DIGITS.get(w, w)) for w in (case.gold, case.answer))
    if gold is None or said is None or gold == said:
        return None
    return f"it counts {said} where there are {gold}, off by {abs(gold - said)}"


def near_miss(case: Case, lean: Lean) -> str | None:
    """Most letters of what was to be read are right."""
    asked = (case.question, case.record.get("benchmark"), case.record.get("slice"))
    if not _READS.search(" ".join(map(str, asked))):
        return None
    if len(case.gold) < 3 or " " in case.gold or case.gold in _KNOWN or not case.answer:
        return None
    score = anls(case.answer, [case.gold])
    if not 0.5 <= score < 1:
        return None
    return f'"{case.answer}" and "{case.gold}" share {100 * score:.0f} % of their letters (ANLS)'


def not_there(case: Case, lean: Lean) -> str | None:
    """It speaks of what the picture does not hold."""
    tags = [] if case.sample is None else case.sample.meta.get("there") or case.sample.tags
    invented = list(case.record.get("invented") or [])
    if not invented and tags:
        there = {word for tag in tags for word in tag.split()} | set(tags)
        words = [w for w in re.findall(r"\w+", case.answer) if w in COLORS or w in SHAPES]
        invented = [word for word in words if word not in there]
        if case.answer == "yes" and case.gold == "no":
            asked = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", case.question)
            invented = [" ".join(tag) for tag in asked if " ".join(tag) not in tags]
    if not invented:
        return None
    return f"it speaks of {', '.join(invented)}, and the picture holds {', '.join(tags)}"


def small_object(case: Case, lean: Lean) -> str | None:
    """What is asked about takes little room."""
    words = set(re.findall(r"\w+", case.question)) | set(case.gold.split())
    asked = {
        tag: area
        for tag, area in case.areas.items()
        if set(tag.split()) <= words or case.gold in tag.split()
    }
    small = {tag: area for tag, area in asked.items() if area <= _SMALL_AREA}
    if not small:
        return None
    tag = min(small, key=lambda name: small[name])
    return f"the {tag} takes {100 * small[tag]:.1f} % of the picture"


def ranking(case: Case, lean: Lean) -> str | None:
    """The right answer is among the first."""
    scores = case.record.get("scores")
    candidates = case.sample.candidates if case.sample is not None else []
    if scores is None or len(candidates) != len(scores):
        return None
    names = [normalize_answer(name) for name in candidates]
    if case.gold not in names:
        return None
    own = scores[names.index(case.gold)]
    above = sum(score > own for score in scores)
    if not 0 < above < min(5, len(scores) - 1):
        return None
    behind = max(scores) - own
    return f"the right answer is number {above + 1} of {len(scores)}, {behind:.3g} behind the first"


RULES: dict[str, Rule] = {
    "format": format_of,
    "OCR near miss": near_miss,
    "counting": counting,
    "object not there": not_there,
    "yes-bias": yes_bias,
    "small object": small_object,
    "language prior": language_prior,
    "ranking": ranking,
}
UNEXPLAINED = "no rule applies"


def explain(case: Case, lean: Lean) -> dict[str, str]:
    """Every hypothesis whose rule applies, the most specific first, with its support."""
    found = {name: rule(case, lean) for name, rule in RULES.items()}
    return {name: support for name, support in found.items() if support is not None}


def _said(value: Any) -> str | None:
    return None if value is None else normalize_answer(str(value))


def _parser(case: Case) -> str:
    return str(case.record.get("parser") or "of the benchmark")


_DIGITS = {str(i): word for word, i in _NUMBERS.items()}
_READS = re.compile(r"\b(words?|written|read|say|text|ocr\w*|textvqa|docvqa|card_reading)\b", re.I)
_KNOWN = {*COLORS, *SHAPES, *_NUMBERS, *YES_NO, "left", "right", "center", "top", "bottom"}

"""Multiple choice: reading the chosen letter, CircularEval, and letter bias.

An answer from which no letter can be read is None, an outcome of its own: it is counted as wrong
and reported as a rate, never replaced by a random letter.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from triptych.evaluation.metrics._shared import choose, mistake

CHOICE_RULES = ("standard", "scienceqa")
CIRCULAR_STRIDE = 1_000_000  # MMBench: rotation r of question q has index q + r * 1,000,000

_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LEADS = re.compile(r"[(\[*]*([A-Z])(?:[)\]*]+[.:]?\s|[.:]\s|번|입니다|이다)")
_ANSWER = re.compile(
    r"(?:\b[Aa]nswer(?:\s+is|\s*:)|정답은|정답\s*:|답은|답\s*:)"
    r"\s*(?:[Oo]ption\s+)?[(\[*\"']*([A-Z])(?![A-Za-z'])"
)
_OPTION = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+[(\[*\"']*([A-Z])(?![A-Za-z'])")
_DENIES = re.compile(r"\b(?:no|not|never|none|neither|nor|cannot|without)\b|n't\b")
_DENIES_AFTER = re.compile(r"아니|않|없")  # Korean denies behind the noun


def parse_choice(
    text: str, options: Sequence[str] | Mapping[str, str], rule: str = "standard"
) -> str | None:
    """Read the letter of the chosen option from a generated answer, or None if it names none.

    `options` are the option texts (lettered A, B, ...) or a mapping letter -> text. `scienceqa` is
    the rule of LLaVA's ScienceQA script: the letter alone, "B. ..." or exactly one "The answer is
    B.". `standard` also reads "(B)", "**B**", "Answer: B", "정답은 B", "B입니다" and an answer that
    holds the text of exactly one option, not denied; the article of "A cat" is not a letter.
    """
    choose(rule, CHOICE_RULES, "parse_choice")
    if not isinstance(options, Mapping):
        options = dict(zip(string.ascii_uppercase, options, strict=False))
    if not options:
        raise mistake("parse_choice: the question has no options; pass their texts in order.")
    letter = _scienceqa(text) if rule == "scienceqa" else _standard(text, options)
    return letter if letter in options else None


def _scienceqa(text: str) -> str | None:
    text = text.replace("\n", ". ")
    if len(text.strip()) == 1:
        return text.strip()
    if text[1:3] == ". ":
        return text[0]
    stated = re.findall(r"The answer is ([A-Z])\.", text)
    return stated[0] if len(stated) == 1 else None


def _standard(text: str, options: Mapping[str, str]) -> str | None:
    text = unicodedata.normalize("NFKC", text).strip()
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    plain, words = _plain(text), {letter: _plain(words) for letter, words in options.items()}
    whole = [letter for letter in options if words[letter] == plain]
    if len(whole) == 1:
        return whole[0]
    lead = _LEADS.match(text + " ")
    if lead and lead[1] in options:
        return lead[1]
    for pattern in (_ANSWER,) if _DENIES.search(plain) else (_ANSWER, _OPTION):
        stated = set(pattern.findall(text)) & set(options)
        if stated:
            return stated.pop() if len(stated) == 1 else None
    return _held(plain, words)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.strip(string.punctuation + string.whitespace + "。").split())


def _held(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose words stand in the text, outside longer options and not denied."""
    found = [
        (match.start(), match.end(), letter)
        for letter, words in options.items()
        if words
        for match in re.finditer(
            rf"(?<!\w)(?<!\d[.,]){re.escape(words)}(?![a-z0-9_])(?![.,]\d)", text
        )
    ]
    outer = [
        (start, end, letter)
        for start, end, letter in found
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in found)
    ]
    denied = any(_DENIES.search(text[:s]) or _DENIES_AFTER.search(text[e:]) for s, e, _ in outer)
    letters = {letter for _, _, letter in outer}
    return letters.pop() if len(letters) == 1 and not denied else None


def circular_accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CircularEval of MMBench (Liu et al. 2023): every rotation must be right.

    A record holds `correct` and either `group` (and optionally `rotation`, 0 = as written; else
    the first of a group is) or MMBench's `index`; `parsed` may be None. Returns `circular` (share
    of groups), `vanilla` (first passes alone), `groups`, `n` and `unparsed` (share of records).
    """
    groups: dict[Any, list[tuple[int, bool]]] = {}
    for record in records:
        if "group" not in record and "index" not in record:
            raise mistake("circular_accuracy: every record needs 'group' or MMBench's 'index'.")
        index = int(record.get("index", 0))
        group = record["group"] if "group" in record else index % CIRCULAR_STRIDE
        passes = groups.setdefault(group, [])
        turn = record.get("rotation", index // CIRCULAR_STRIDE if "group" not in record else None)
        passes.append((len(passes) if turn is None else int(turn), bool(record["correct"])))
    if not groups:
        raise mistake("circular_accuracy: there are no records; pass at least one.")
    first = [min(passes, key=lambda p: p[0])[1] for passes in groups.values()]
    lost = sum("parsed" in record and record["parsed"] is None for record in records)
    return {
        "circular": sum(all(ok for _, ok in p) for p in groups.values()) / len(groups),
        "vanilla": sum(first) / len(first),
        "groups": len(groups),
        "n": len(records),
        "unparsed": lost / len(records),
    }


def letter_report(
    parsed: Sequence[str | None], gold: Sequence[str]
) -> dict[str, dict[str | None, float]]:
    """Show letter bias: `chosen` is the share of each letter (None = unparsed), `accuracy` the
    share right among the questions whose gold letter it is.
    """
    if len(parsed) != len(gold) or not gold:
        raise mistake("letter_report needs one parsed letter (or None) for every gold letter.")
    chosen, asked = Counter(parsed), Counter(gold)
    right = Counter(g for p, g in zip(parsed, gold, strict=True) if p == g)
    return {
        "chosen": {k: chosen[k] / len(gold) for k in sorted(chosen, key=lambda k: k or "~")},
        "accuracy": {k: right[k] / asked[k] for k in sorted(asked)},
    }

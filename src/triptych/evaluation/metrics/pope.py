"""POPE, object hallucination by yes/no questions (Li et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from triptych.evaluation.metrics._shared import as_array, choose, mistake, same_ids

POPE_RULES = ("official", "strict")
_STRICT = re.compile(r"[\W_]*(yes|no|네|예|아니요|아니오)\b.*", re.IGNORECASE | re.DOTALL)
_YES = {"yes", "네", "예"}

Answers = Mapping[Hashable, str | None] | Sequence[str | None]


def parse_pope(text: str, rule: str = "official") -> str | None:
    """Read "yes" or "no" from an answer.

    `official`: the words No, no or not before the first period mean "no", EVERYTHING else "yes",
    the empty answer, "NO" and "아니오" among it. `strict`: the first word must be yes or no (any
    case, Korean too), else None.
    """
    if choose(rule, POPE_RULES, "parse_pope") == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    match = _STRICT.fullmatch(text)
    return None if match is None else "yes" if match[1].lower() in _YES else "no"


def pope_scores(parsed: Answers, labels: Answers) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes ratio with "yes" as the positive class.

    Both are `{id: answer}`, joined by id, or two sequences of equal length. None (unparsed) is
    wrong: it is a miss where the label is "yes" and never a predicted "yes". Ratios over nothing
    are 0. Score the three splits apart; papers report the mean of their F1, not that of the union.
    """
    if isinstance(parsed, Mapping) != isinstance(labels, Mapping):
        raise mistake("pope_scores: give both answers and labels as {id: answer}, or neither.")
    if isinstance(parsed, Mapping) and isinstance(labels, Mapping):
        same_ids(parsed, labels, "pope_scores")
        parsed, labels = list(parsed.values()), [labels[key] for key in parsed]
    if len(parsed) != len(labels) or not labels:
        raise mistake(f"pope_scores: {len(parsed)} answers for {len(labels)} labels; join by id.")
    for name, values, allowed in (
        ("answer", parsed, {"yes", "no", None}),
        ("label", labels, {"yes", "no"}),
    ):
        if odd := set(values) - allowed:
            raise mistake(
                f"pope_scores: the {name} {odd.pop()!r} is neither 'yes' nor 'no'; use parse_pope."
            )
    n, said, positive = len(labels), list(parsed).count("yes"), list(labels).count("yes")
    pairs = list(zip(parsed, labels, strict=True))
    hits = sum(p == g == "yes" for p, g in pairs)
    precision, recall = hits / max(1, said), hits / max(1, positive)
    return {
        "accuracy": sum(p == g for p, g in pairs) / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": said / n,
        "unparsed": list(parsed).count(None) / n,
        "n": n,
    }


def auroc(scores: Sequence[float], labels: Sequence[str]) -> float:
    """Area under the ROC curve of a "yes" score, e.g. log P(yes) - log P(no); ties count half."""
    values, positive = as_array(scores).astype(np.float64), np.array([g == "yes" for g in labels])
    yes, no = values[positive], np.sort(values[~positive])
    if values.shape != positive.shape or not yes.size or not no.size:
        raise mistake("auroc needs one score a label, and both 'yes' and 'no' among the labels.")
    below, upto = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return float((below + upto).sum() / (2 * yes.size * no.size))

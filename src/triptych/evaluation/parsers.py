"""From what a model wrote to an answer, or to None: `unparsed` is an outcome, never a guess."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_EDGES = " \t\r\n.,!?;:\"'`*。，！？"


def normalize_answer(text: str) -> str:
    """NFC, lower case, single blanks, and no punctuation at the two ends."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split()).strip(_EDGES)


def exact_answer(text: str, candidates: Sequence[str] = ()) -> str | None:
    """The whole text as an answer; with a closed list it must be one of the list."""
    answer = normalize_answer(text)
    allowed = {normalize_answer(candidate) for candidate in candidates}
    return answer if answer and (not allowed or answer in allowed) else None


def mentioned_answer(text: str, candidates: Sequence[str] = ()) -> str | None:
    """The only candidate that the text mentions as a word ("It is blue." -> "blue").

    For models that answer in sentences. Without a closed list it is the whole text.
    """
    exact = exact_answer(text, candidates)
    if exact is not None or not candidates:
        return exact
    answer = normalize_answer(text)
    names = {normalize_answer(candidate) for candidate in candidates}
    found = [n for n in names if n and re.search(rf"(?<!\w){re.escape(n)}(?!\w)", answer)]
    return found[0] if len(found) == 1 else None

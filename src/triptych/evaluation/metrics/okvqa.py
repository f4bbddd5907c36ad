"""The stemmer of OK-VQA (Marino et al. 2019), whose ten gold answers are stemmed words.

An answer as a model writes it ("surfing") never equals the gold one ("surf"). The annotation files
hold both forms of every annotator's answer, so the mapping is read from them; words they do not
hold are stemmed by rule, towards stems they do hold. Nothing has to be downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

STEMMER = "annotated-pairs-1"


class Stemmer:
    """Stems the words of an answer.

    pairs: counts of (raw word, stem), as `VQA.stems` reads them. The most frequent stem of a word
    wins, equal counts go to the one that is first in the alphabet.
    """

    name = STEMMER

    def __init__(self, pairs: Mapping[tuple[str, str], int]) -> None:
        best: dict[str, tuple[int, str]] = {}
        for (raw, stem), count in pairs.items():
            known = best.get(raw)
            if known is None or (-count, stem) < known:
                best[raw] = (-count, stem)
        self.table = {raw: stem for raw, (_, stem) in best.items()}
        self.stems = Counter(self.table.values())

    def stem(self, text: str) -> str:
        """The answer in lower case, each word replaced by its stem; final marks are dropped."""
        return " ".join(self._word(word) for word in text.lower().strip(" \t\n.,!?").split())

    def _word(self, word: str) -> str:
        if word in self.table:
            return self.table[word]
        return next((form for form in _forms(word) if form in self.stems), word)


def _forms(word: str) -> list[str]:
    """What a plural or an -ing form may come from, likeliest first."""
    forms = []
    if word.endswith("ing") and len(word) > 4:
        root = word[:-3]
        forms += [root, root + "e"]
        forms += [root[:-1]] if len(root) > 2 and root[-1] == root[-2] else []
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    return forms

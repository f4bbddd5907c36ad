"""Short-answer metrics: VQA accuracy (VQAv2, OK-VQA, TextVQA) and GQA exact match.

VQA accuracy follows the second release of the official evaluation code: each annotator is left
out in turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from triptych.evaluation.metrics._shared import choose, mistake

VQA_RULES = ("official", "always_normalise", "evalai")
GQA_RULES = ("rstrip_lower", "official")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # official: no colon, percent, dollar or apostrophe
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes re.UNICODE (32) where re.sub expects `count`
_COUNTING = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_COUNTING.split())}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _one_apostrophe_lost() -> dict[str, str]:
    """Every word of the list with one apostrophe missing -> the word (the official table)."""
    table = {"somebody'd": "somebodyd"}  # reversed in the official table, so reversed here
    for word in _CONTRACTIONS.split():
        for at in (i for i, letter in enumerate(word) if letter == "'"):
            table[word[:at] + word[at + 1 :]] = word
    return table


CONTRACTIONS = _one_apostrophe_lost()


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    """Delete a mark that touches a blank, else write a blank; both tests see the ORIGINAL text."""
    out, digits = text, bool(_DIGIT_COMMA.search(text))
    for mark in _PUNCTUATION:
        if mark in text:
            deleted = digits or mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


@lru_cache(maxsize=1 << 16)  # the same short answers come back by the hundred thousand
def normalize_vqa(text: str) -> str:
    """Normalise an answer as the official VQA evaluation does (punctuation, numbers, articles).

    Colon, percent, dollar, apostrophe and full-width marks stay; "none" is 0; "3." loses its
    period and "3.5" keeps it; an answer of articles alone becomes the empty string.
    """
    return _words(_punctuation(_strip(text)))


@lru_cache(maxsize=1 << 16)
def normalize_evalai(text: str) -> str:
    """Normalise as the EvalAI processor of TextVQA: commas and ? vanish first, 's splits off.

    "red,blue" is "redblue" here and "red blue" under `normalize_vqa`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(_strip(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str = "official") -> float:
    """Score one answer against its annotators: mean over annotators of min(1, other matches / 3).

    With ten annotators 1 match gives 0.3, 2 give 0.6, 3 give 0.9 and 4 give 1. Rules:
    `official` (VQAv2, OK-VQA): normalise both sides only if the annotators disagree;
    `always_normalise`: normalise always; `evalai` (TextVQA): `normalize_evalai` always.
    Annotators are left out by position, so equal answers never vanish together.
    """
    choose(rule, VQA_RULES, "vqa_accuracy")
    if isinstance(answers, str) or len(answers) < 2:
        raise mistake(
            "vqa_accuracy needs a list of 2 or more annotators' answers, because it leaves each "
            "one out in turn; score a single gold answer with gqa_exact."
        )
    if rule == "evalai":
        prediction, answers = normalize_evalai(prediction), [normalize_evalai(a) for a in answers]
    else:
        prediction, answers = _strip(prediction), [_strip(a) for a in answers]
        if rule == "always_normalise" or len(set(answers)) > 1:
            prediction, answers = normalize_vqa(prediction), [normalize_vqa(a) for a in answers]
    matches = sum(answer == prediction for answer in answers)
    left_out = (matches - (answer == prediction) for answer in answers)
    return sum(min(1.0, others / 3) for others in left_out) / len(answers)


def gqa_exact(prediction: str, gold: str, rule: str = "rstrip_lower") -> float:
    """1.0 if the answer equals the gold answer, else 0.0 (Hudson & Manning 2019).

    `official` is plain string equality; `rstrip_lower` first drops trailing periods and lowers
    the prediction, as answers of generative models are converted for the official script.
    No further normalisation: "two" is not "2" and "tshirt" is not "t-shirt".
    """
    if choose(rule, GQA_RULES, "gqa_exact") == "rstrip_lower":
        prediction = prediction.strip().rstrip(".").lower()
    return float(prediction == gold)

"""VQA accuracy, GQA, ANLS, relaxed accuracy, CER and WER on hand-computed cases."""

from __future__ import annotations

import hashlib
import unicodedata

import pytest

from triptych.evaluation.metrics import (
    anls,
    cer,
    edit_counts,
    gqa_exact,
    normalize_evalai,
    normalize_vqa,
    relaxed_accuracy,
    vqa_accuracy,
    wer,
)
from triptych.evaluation.metrics.vqa import CONTRACTIONS
from triptych.types import TriptychError


@pytest.mark.parametrize("matches, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_vqa_leaves_one_annotator_out(matches, score):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("red", answers) == pytest.approx(score)


def test_vqa_leaves_out_by_position_not_by_value():
    # ten equal answers: by value all ten would vanish at once
    assert vqa_accuracy("black", ["black"] * 10) == 1.0


def test_vqa_uneven_annotators():
    assert vqa_accuracy("a cat", ["cat", "cat", "dog"]) == pytest.approx(
        (1 / 3 + 1 / 3 + 2 / 3) / 3
    )
    assert vqa_accuracy("cat", ["cat", "cat"]) == pytest.approx(1 / 3)
    with pytest.raises(TriptychError, match="2 or more"):
        vqa_accuracy("cat", ["cat"])
    with pytest.raises(TriptychError, match="list"):
        vqa_accuracy("cat", "cat")


def test_vqa_unanimous_answers_are_not_normalised():
    assert vqa_accuracy("Black.", ["black"] * 10) == 0.0
    assert vqa_accuracy("Black.", ["black"] * 10, "always_normalise") == 1.0
    assert vqa_accuracy("Black.", ["black"] * 9 + ["grey"]) == 1.0
    assert vqa_accuracy(" black\n", ["black"] * 10) == 1.0


def test_vqa_empty_answers():
    assert vqa_accuracy("", ["the"] * 4 + ["cat"] * 6) == 1.0  # articles alone become ""
    assert vqa_accuracy("", ["dog"] * 4 + ["cat"] * 6) == 0.0


def test_vqa_rule_must_exist():
    with pytest.raises(TriptychError, match="official, always_normalise, evalai"):
        vqa_accuracy("a", ["a", "b"], "lenient")


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("None", "0"),
        ("Two dogs", "2 dogs"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("t-shirt", "t shirt"),
        ("black -white", "black white"),
        ("1,000 (about)", "1000 about"),
        ("1,000/x", "1000x"),
        ("red,blue", "red blue"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("50% of $5: x", "50% of $5: x"),
        ("고양이.", "고양이"),
        ("고양이。", "고양이。"),
        ("the", ""),
        ("a\tb\nc", "b c"),
        ("." * 40, "." * 8),
    ],
)
def test_normalize_vqa(raw, clean):
    assert normalize_vqa(raw) == clean


def test_contractions_are_the_official_ones():
    rows = "\n".join(f"{k} {v}" for k, v in sorted(CONTRACTIONS.items()))
    assert len(CONTRACTIONS) == 114
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "f2c800b1132e7930"


def test_evalai_differs_from_vqa():
    assert normalize_evalai("Red,blue?") == "redblue"
    assert normalize_evalai("the dog's 2 bowls") == "dog 's 2 bowls"
    assert vqa_accuracy("Red,Blue", ["redblue"] * 10, "evalai") == 1.0
    assert vqa_accuracy("Red,Blue", ["redblue"] * 10) == 0.0


def test_gqa_exact():
    assert gqa_exact("Yes.", "yes") == 1.0
    assert gqa_exact("Yes.", "yes", "official") == 0.0
    assert gqa_exact("two", "2") == 0.0
    assert gqa_exact("tshirt", "t-shirt") == 0.0
    assert gqa_exact("", "yes") == 0.0


def test_anls_threshold_and_raw_length():
    assert anls("abcd", ["abcd"]) == 1.0
    assert anls("abxy", ["abcd"]) == 0.5  # exactly one half counts
    assert anls("axyz", ["abcd"]) == 0.0
    assert anls("cats ", [" cat"]) == pytest.approx(0.8)  # 1 edit / 5 raw characters
    assert anls("no", ["yes", "No"]) == 1.0
    assert anls("", [""]) == 1.0
    assert anls("", ["x"]) == 0.0
    assert anls("x", "x") == 1.0
    with pytest.raises(TriptychError, match="empty"):
        anls("x", [])


def test_anls_composes_hangul():
    assert anls(unicodedata.normalize("NFD", "고양이"), ["고양이"]) == 1.0
    assert anls("고양기", ["고양이"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "prediction, target, right",
    [
        ("104", "100", 1),
        ("106", "100", 0),
        ("2.0", "2.1", 1),
        ("2.0", "1.9", 0),
        ("50%", "0.5", 1),
        ("0", "0.0", 0),
        ("0", "0", 1),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("$5", "5", 0),
        ("5명", "5", 0),
        ("5명", " 5명 ", 1),
        ("nan", "nan", 0),
        ("inf", "inf", 0),
        ("１２", "12", 1),
        ("Yes ", "yes", 1),
        ("2008", "1910", 0),
        ("1910", "2008", 1),
        ("", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction, target, right):
    assert relaxed_accuracy(prediction, target) == right


def test_relaxed_accuracy_takes_the_best_target():
    assert relaxed_accuracy("7", ["3", "7.1"]) == 1.0


def test_error_rates_are_of_the_corpus():
    predictions, references = ["hello wrld", "x"], ["hello world", "a much longer reference"]
    edits = [edit_counts(p, r) for p, r in zip(predictions, references, strict=True)]
    assert [e.symbols for e in edits] == [11, 23]
    assert edits[0].edits == 1 and edits[1].edits == 23
    assert cer(predictions, references) == 24 / 34  # the mean of rates would be 0.545
    assert wer(predictions, references) == (1 + 4) / (2 + 4)


def test_error_rates_of_hangul_and_of_nothing():
    assert cer([unicodedata.normalize("NFD", "한글")], ["한글"]) == 0.0
    assert cer("한굴", "한글") == 0.5
    assert wer("나는 학교에", "나는  학교에 간다") == pytest.approx(1 / 3)
    assert cer([""], ["abc"]) == 1.0
    assert cer(["abcdef"], ["abc"]) == 1.0
    assert cer(["", ""], ["", ""]) == 0.0
    assert cer(["ab"], [""]) == 2.0
    with pytest.raises(TriptychError, match="1 predictions for 2 references"):
        wer(["a"], ["a", "b"])

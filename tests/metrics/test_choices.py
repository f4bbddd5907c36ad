"""Multiple choice, POPE, candidate ranking and language-model sums on hand-computed cases."""

from __future__ import annotations

import math

import pytest

from triptych.evaluation.metrics import (
    CandidateScore,
    auroc,
    bits_per_byte,
    circular_accuracy,
    letter_report,
    parse_choice,
    parse_pope,
    perplexity,
    pope_scores,
    rank_candidates,
)
from triptych.types import TriptychError

OPTIONS = ["a dog", "a cat", "a rabbit", "a black cat"]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        (" b ", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("Ｂ", "B"),
        ("B. a cat", "B"),
        ("B) a cat", "B"),
        ("(B) a cat", "B"),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("I think the answer is (D) because of its colour", "D"),
        ("Option A", "A"),
        ("정답은 B입니다.", "B"),
        ("B입니다", "B"),
        ("답: C", "C"),
        ("A cat", "B"),
        ("A rabbit is shown", "C"),
        ("It is a black cat.", "D"),
        ("a dog or a cat", None),
        ("It is not a cat", None),
        ("Option A is not right", None),
        ("I cannot answer. Cannot determine", None),
        ("E", None),
        ("I", None),
        ("", None),
        ("...", None),
    ],
)
def test_parse_choice(text, letter):
    assert parse_choice(text, OPTIONS) == letter


def test_parse_choice_reads_korean_options_and_numbers():
    assert parse_choice("고양이가 있다", ["개", "고양이"]) == "B"
    assert parse_choice("고양이가 아니다", ["개", "고양이"]) is None
    assert parse_choice("There are 2.", ["2", "25"]) == "A"
    assert parse_choice("It is 2.5", ["2", "25"]) is None
    assert parse_choice("No, there isn't", ["Yes", "No"]) == "B"
    assert parse_choice("a cat", {"C": "a cat", "A": "a dog"}) == "C"


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B. a cat", "B"),
        ("B\nbecause", "B"),
        ("The answer is C.", "C"),
        ("The answer is C", None),
        ("The answer is C. The answer is D.", None),
        ("(B)", None),
        ("a cat", None),
        ("E", None),
    ],
)
def test_parse_choice_of_scienceqa(text, letter):
    assert parse_choice(text, OPTIONS, "scienceqa") == letter


def test_parse_choice_needs_options():
    with pytest.raises(TriptychError, match="no options"):
        parse_choice("A", [])


def test_circular_accuracy_needs_every_rotation():
    records = [
        {"index": 7, "correct": True, "parsed": "A"},
        {"index": 1_000_007, "correct": True, "parsed": "B"},
        {"index": 2_000_008, "correct": False, "parsed": None},
        {"index": 8, "correct": True, "parsed": "A"},
    ]
    result = circular_accuracy(records)
    assert result == {"circular": 0.5, "vanilla": 1.0, "groups": 2, "n": 4, "unparsed": 0.25}
    named = [{"group": "x", "correct": False}, {"group": "x", "correct": True}]
    assert circular_accuracy(named)["vanilla"] == 0.0
    assert circular_accuracy([r | {"rotation": i ^ 1} for i, r in enumerate(named)])["vanilla"] == 1


def test_letter_report_shows_bias():
    report = letter_report(["A", "A", None, "A"], ["A", "B", "B", "A"])
    assert report == {"chosen": {"A": 0.75, None: 0.25}, "accuracy": {"A": 1.0, "B": 0.0}}


@pytest.mark.parametrize(
    "text, official, strict",
    [
        ("No", "no", "no"),
        ("no, there is not", "no", "no"),
        ("Yes.", "yes", "yes"),
        ("YES, there is.", "yes", "yes"),
        ("", "yes", None),
        ("NO", "yes", "no"),
        ("No!", "yes", "no"),
        ("There isn't", "yes", None),
        ("It does not", "no", None),
        ("A dog. No", "yes", None),
        ("아니오", "yes", "no"),
        ("네, 있습니다", "yes", "yes"),
        ("Nothing", "yes", None),
    ],
)
def test_parse_pope(text, official, strict):
    assert parse_pope(text) == official
    assert parse_pope(text, "strict") == strict


def test_pope_scores_by_hand():
    parsed = {1: "yes", 2: "yes", 3: "no", 4: None, 5: None, 6: "no"}
    labels = {6: "no", 5: "no", 4: "yes", 3: "yes", 2: "no", 1: "yes"}
    scores = pope_scores(parsed, labels)
    assert scores["accuracy"] == pytest.approx(2 / 6)
    assert scores["precision"] == 1 / 2
    assert scores["recall"] == pytest.approx(1 / 3)  # the unparsed "yes" is a miss
    assert scores["f1"] == pytest.approx(0.4)
    assert scores["yes_ratio"] == pytest.approx(2 / 6)
    assert scores["unparsed"] == pytest.approx(2 / 6)


def test_pope_is_joined_by_id_and_survives_no_yes():
    with pytest.raises(TriptychError, match="same ids"):
        pope_scores({1: "yes"}, {2: "yes"})
    with pytest.raises(TriptychError, match="1 answers for 2 labels"):
        pope_scores(["yes"], ["yes", "no"])
    with pytest.raises(TriptychError, match="neither"):
        pope_scores(["Yes!"], ["yes"])
    assert pope_scores(["no", "no"], ["yes", "no"])["f1"] == 0.0


def test_auroc_counts_ties_half():
    assert auroc([0.9, 0.1], ["yes", "no"]) == 1.0
    assert auroc([1, 1, 1], ["yes", "no", "no"]) == 0.5
    assert auroc([3, 1, 2, 0], ["yes", "yes", "no", "no"]) == 0.75


def test_each_ranking_rule_has_its_own_winner():
    scores = [
        CandidateScore(sum=-4.0, tokens=1, chars=2, bytes=2, prior=-4.0),
        CandidateScore(sum=-5.0, tokens=5, chars=5, bytes=5, prior=-5.0),
        CandidateScore(sum=-6.0, tokens=2, chars=12, bytes=12, prior=-6.0),
        CandidateScore(sum=-7.0, tokens=4, chars=7, bytes=21, prior=-7.0),
        CandidateScore(sum=-8.0, tokens=4, chars=8, bytes=8, prior=-12.0),
    ]
    winners = {r: rank_candidates(scores, r).best for r in ("sum", "token", "char", "byte", "pmi")}
    assert winners == {"sum": 0, "token": 1, "char": 2, "byte": 3, "pmi": 4}
    assert rank_candidates(scores, "sum").order == [0, 1, 2, 3, 4]
    assert rank_candidates([s._asdict() for s in scores], "byte").values[3] == pytest.approx(-1 / 3)


def test_ranking_ties_give_chance_credit():
    ranking = rank_candidates([{"sum": -1.0}, {"sum": -1.0}, {"sum": -2.0}])
    assert ranking.best == 0 and ranking.winners == [0, 1]
    assert [ranking.credit(i) for i in range(3)] == [0.5, 0.5, 0.0]


def test_ranking_names_what_is_missing():
    with pytest.raises(TriptychError, match="'tokens' of candidate 0"):
        rank_candidates([{"sum": -1.0}], "token")
    with pytest.raises(TriptychError, match="candidate 1 is empty"):
        rank_candidates([{"sum": -1.0, "bytes": 3}, {"sum": 0.0, "bytes": 0}], "byte")
    with pytest.raises(TriptychError, match="no candidates"):
        rank_candidates([])
    with pytest.raises(TriptychError, match="sum, token, char, byte, pmi"):
        rank_candidates([{"sum": -1.0}], "mean")
    with pytest.raises(TriptychError, match="'sum' of candidate 0"):
        rank_candidates([{"sum": math.nan}])


def test_perplexity_and_bits_come_from_sums():
    assert perplexity([math.log(2) * 2, math.log(8) * 1], [2, 1]) == pytest.approx(2 ** (5 / 3))
    assert perplexity(3 * math.log(5), 3) == pytest.approx(5.0)
    assert bits_per_byte([math.log(2) * 6], [len("고양".encode())]) == pytest.approx(1.0)
    with pytest.raises(TriptychError, match="more than 0"):
        perplexity([1.0], [0])
    with pytest.raises(TriptychError, match="finite"):
        bits_per_byte([math.nan], [1])

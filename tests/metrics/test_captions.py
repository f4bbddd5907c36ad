"""BLEU, ROUGE-L, CIDEr-D, the tokeniser and CHAIR on hand-computed cases."""

from __future__ import annotations

import math

import pytest

from triptych.evaluation.metrics import (
    bleu,
    chair,
    cider_d,
    mentioned_objects,
    ptb,
    ptb_tokenize,
    read_synonyms,
    rouge_l,
    tokenizer_name,
)
from triptych.types import TriptychError


def test_bleu_by_hand():
    corpus, values = bleu({1: "the the the cat"}, {1: ["the cat sat down", "a the cat"]})
    assert corpus[0] == pytest.approx(2 / 4)  # one "the" is clipped to one, "cat" is right
    assert corpus[1] == pytest.approx(math.sqrt(2 / 4 * 1 / 3))
    assert values[1] == pytest.approx(corpus)


def test_bleu_reference_length_is_the_shorter_of_two_as_close():
    # lengths 2 and 4 are as close to 3; the shorter one means no brevity penalty
    corpus, _ = bleu({1: "a b c"}, {1: ["a b c d", "a b"]})
    assert corpus[0] == pytest.approx(1.0)
    corpus, _ = bleu({1: "a b"}, {1: ["a b c d", "a b c"]})
    assert corpus[0] == pytest.approx(math.exp(1 - 3 / 2))


def test_bleu_is_a_ratio_of_sums_not_a_mean():
    captions, references = {1: "a b", 2: "x"}, {1: ["a b"], 2: ["y"]}
    corpus, values = bleu(captions, references)
    assert corpus[0] == pytest.approx(2 / 3)
    assert (values[1][0] + values[2][0]) / 2 == pytest.approx(0.5)


def test_empty_caption_scores_zero():
    captions, references = {1: "", 2: "a cat"}, {1: ["a cat"], 2: ["a cat"]}
    assert bleu(captions, references)[1][1] == pytest.approx([0.0] * 4, abs=1e-6)
    assert rouge_l(captions, references)[1][1] == 0.0
    assert cider_d(captions, references)[1][1] == 0.0


def test_rouge_takes_best_precision_and_best_recall_apart():
    _, values = rouge_l({1: "a b c d"}, {1: ["a b c d x x x x", "a"]})
    assert values[1] == pytest.approx(1.0)  # precision of the first, recall of the second
    corpus, values = rouge_l({1: "a b c", 2: "고양이 한 마리"}, {1: ["a c"], 2: ["고양이 두 마리"]})
    p, r = 2 / 3, 1.0
    assert values[1] == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))
    assert values[2] == pytest.approx(2 / 3)
    assert corpus == pytest.approx((values[1] + values[2]) / 2)


def test_cider_of_one_image_is_zero():
    assert cider_d({1: "a cat sat on a mat"}, {1: ["a cat sat on a mat"]})[0] == 0.0


def test_cider_by_hand():
    corpus, values = cider_d({1: "a b", 2: "z"}, {1: ["a b"], 2: ["c d"]})
    # unigrams and bigram match wholly (cosine 1 each of four orders), nothing else can
    assert values[1] == pytest.approx(10 * (1 + 1) / 4)
    assert values[2] == 0.0
    assert corpus == pytest.approx(values[1] / 2)


def test_cider_clips_repeats_and_penalises_length():
    _, values = cider_d({1: "a b b b", 2: "z"}, {1: ["a b"], 2: ["c d"]})
    clipped = (1 + 1) / (math.sqrt(1 + 9) * math.sqrt(2))  # "b" three times, clipped to one
    bigram = 1 / math.sqrt(1 + 4)
    penalty = math.exp(-((3 - 1) ** 2) / 72)
    assert values[1] == pytest.approx(10 * penalty * (clipped + bigram) / 4)


def test_cider_depends_on_the_set():
    captions = {i: c for i, c in enumerate(["a red cat", "a dog runs", "a red bus"])}
    references = {i: [c + " here", c] for i, c in captions.items()}
    whole = cider_d(captions, references)[1]
    part = cider_d({i: captions[i] for i in (0, 1)}, {i: references[i] for i in (0, 1)})[1]
    assert whole[0] != pytest.approx(part[0])


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d])
def test_captions_and_references_must_fit(metric):
    with pytest.raises(TriptychError, match="2 is on one only"):
        metric({1: "a", 2: "b"}, {1: ["a"]})
    with pytest.raises(TriptychError, match="exactly one caption"):
        metric({1: ["a", "b"]}, {1: ["a"]})
    with pytest.raises(TriptychError, match="one or more references"):
        metric({1: "a"}, {1: []})
    with pytest.raises(TriptychError, match="nothing to score"):
        metric({}, {})


def test_tokenizer_without_java(monkeypatch):
    pytest.importorskip("nltk")
    monkeypatch.setattr(ptb, "java", lambda: None)
    assert tokenizer_name().startswith("nltk-")
    references = {1: ["A man's (red) hat.", "고양이가 있다."], 2: [""]}
    assert ptb_tokenize(references) == {
        1: ["a man 's -lrb- red -rrb- hat", "고양이가 있다"],
        2: [""],
    }
    assert ptb_tokenize({1: "A dog. It isn't\nbig!"}) == {1: "a dog it is n't big"}
    assert ptb_tokenize(["Dr. No, St. Ives"]) == ["dr. no st. ives"]
    with pytest.raises(TriptychError, match="needs Java"):
        ptb_tokenize(["a"], "stanford")


def test_objects_of_a_caption():
    assert mentioned_objects("Two men and three dogs") == ["person", "dog"]
    assert mentioned_objects("a hot dog on a bench") == ["hot dog", "bench"]
    assert mentioned_objects("a bow tie, a baby elephant and a passenger jet") == [
        "tie",
        "elephant",
        "airplane",
    ]
    assert mentioned_objects("a toilet seat") == ["toilet"]
    assert mentioned_objects("a toilet with its seat up") == ["toilet"]
    assert mentioned_objects("a seat") == ["chair"]
    assert mentioned_objects("wine glasses, knives, buses and mice") == [
        "wine glass",
        "knife",
        "bus",
        "mouse",
    ]
    assert mentioned_objects("he cares about glasses") == []
    assert mentioned_objects("cats, a cat") == ["cat", "cat"]


def test_chair_by_hand():
    captions = {1: "a cat and a dog and a dog", 2: "a blue sky", 3: "a bus by a car"}
    objects = {1: ["cat", "Couch"], 2: [], 3: ["bus"]}
    references = {1: ["a kitten"], 2: ["sky"], 3: ["an automobile", "a bus"]}
    corpus, details = chair(captions, objects, references)
    assert corpus["chair_i"] == pytest.approx(2 / 5)  # both mentions of the dog count
    assert corpus["chair_s"] == pytest.approx(1 / 3)  # the caption without objects counts too
    assert corpus["recall"] == pytest.approx(3 / 4)
    assert corpus["words"] == pytest.approx((8 + 3 + 5) / 3)
    assert details[1] == {
        "mentions": ["cat", "dog", "dog"],
        "invented": ["dog", "dog"],
        "missed": ["couch"],
    }


def test_chair_without_mentions_and_with_an_own_table(tmp_path):
    assert chair({1: "nothing"}, {1: []}, {1: []})[0]["chair_i"] == 0.0
    (tmp_path / "words.txt").write_text("circle, disc, round thing\nsquare,  cube, box \n")
    table = read_synonyms(tmp_path / "words.txt")
    corpus, _ = chair({1: "a round thing and boxes"}, {1: ["circle"]}, {1: []}, table)
    assert corpus["chair_i"] == 0.5
    assert mentioned_objects("a cube", table) == []  # two blanks before it, as in the paper's file
    with pytest.raises(TriptychError, match="does not exist"):
        read_synonyms(tmp_path / "none.txt")

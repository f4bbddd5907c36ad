"""The capability card: graded samples with known answers, and every way of answering them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import pytest

from triptych.data.scenes import COLORS, WORDS
from triptych.data.shapes import Shapes
from triptych.data.shapes_text import NUMBERS
from triptych.evaluation.baselines import question_of
from triptych.evaluation.card.benchmarks import (
    Generation,
    Graded,
    Hallucination,
    Reading,
    Retrieval,
    card_answer,
    named_objects,
    read_word,
)
from triptych.evaluation.card.scenes import ABILITIES, GRADES, KINDS, CardScenes
from triptych.evaluation.predictor import Score
from triptych.evaluation.runner import evaluate
from triptych.types import DataError, Sample

SIZE = 8


def benchmarks(size: int = SIZE) -> dict:
    kinds = [Generation, Reading, Graded, Retrieval, Hallucination]
    return {
        f"card_{ability}": kind(CardScenes(ability, size), CardScenes(ability, size, "train"))
        for ability, kind in zip(ABILITIES, kinds, strict=True)
    }


class Knows:
    """Answers each sample by a rule over its own truth; every capability is one road to it."""

    batch_size, vision_calls, generated_tokens = 4, 0, 0

    def __init__(self, *capabilities: str, says=lambda sample: str(sample.target)) -> None:
        self.capabilities, self.says = frozenset(capabilities), says

    def generate(self, samples: Sequence[Sample], **decoding: object) -> list[str]:
        return [self.says(sample) for sample in samples]

    def loglikelihood(self, samples, candidates):
        # without its picture a sentence is likely by its length alone
        return [
            [Score(len(c) + 9.5 * (bool(s.images) and c == self.says(s)), 1, 1) for c in cs]
            for s, cs in zip(samples, candidates, strict=True)
        ]


def score(predictor, chosen: dict, blind: str = "none") -> dict:
    return evaluate(predictor, chosen, None, blind=blind, progress=False)["metrics"]


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ability", ABILITIES)
def test_samples_are_graded_reproducible_and_held_out(ability):
    first, again = CardScenes(ability, SIZE), CardScenes(ability, SIZE)
    counts = Counter((s.meta["kind"], s.meta["grade"]) for s in first)
    assert counts == {(k, g): SIZE for k in KINDS[ability] for g in GRADES}
    assert len(first) == sum(counts.values()) == len({s.id for s in first})
    assert [(s.id, s.text, s.target, s.candidates) for s in first] == [
        (s.id, s.text, s.target, s.candidates) for s in again
    ]
    one, other = first[0].images[0], again[0].images[0]
    assert one.key == other.key and one.open().tobytes() == other.open().tobytes()
    keys = {s.images[0].key for s in first}
    assert keys.isdisjoint(s.images[0].key for s in CardScenes(ability, SIZE, "train"))
    pictures = {s.images[0].open().tobytes() for s in first}
    assert pictures.isdisjoint(Shapes("test", 50).image(i).open().tobytes() for i in range(50))
    for sample in first:
        assert not sample.tags, "no model is told what there is"
        assert not sample.candidates or sample.target in sample.candidates
        assert len(set(sample.candidates)) == len(sample.candidates)
        assert len(sample.meta.get("captions", sample.candidates)) == len(sample.candidates)


def test_hallucination_is_balanced_and_its_grades_are_nearer_and_nearer():
    samples = list(CardScenes("hallucination", 20))
    assert Counter(s.target for s in samples) == {"yes": 30, "no": 30}
    for sample in samples:
        asked = named_objects(question_of(sample))[0]
        assert (asked in sample.meta["there"]) == (sample.target == "yes")
        if sample.target == "no":
            color, shape = asked.split()
            words = {word for tag in sample.meta["there"] for word in tag.split()}
            near = (color in words) + (shape in words)
            assert near == GRADES.index(sample.meta["grade"])


def test_counts_are_those_of_the_picture():
    samples = [s for s in CardScenes("reasoning", 20) if s.meta["kind"] == "counting"]
    for sample in samples:
        color = next(word for word in question_of(sample).split() if word in COLORS)
        count = sum(tag.startswith(color + " ") for tag in sample.meta["there"])
        assert sample.target == NUMBERS[count]
    assert len({s.target for s in samples}) == 5


def test_reading_asks_for_the_word_that_is_painted():
    for sample in CardScenes("reading", 4):
        assert sample.target == sample.meta["word"] and sample.target in WORDS


def test_retrieval_offers_ten_captions_with_one_true():
    for sample in CardScenes("retrieval", 4):
        assert len(sample.candidates) == 10
        if sample.meta["grade"] == "hard":  # each differs from the truth in one object at most
            for caption in sample.candidates:
                gone = set(sample.target.split()) - set(caption.split())
                assert len(gone) <= 4, (sample.target, caption)


def test_mistakes_are_said():
    with pytest.raises(DataError, match="ability 'magic'"):
        CardScenes("magic")
    with pytest.raises(DataError, match="size 1"):
        CardScenes("reading", 0)


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "candidates", "read"),
    [
        ("There are 2.", NUMBERS, "two"),
        ("two", NUMBERS, "two"),
        ("no, none", ["yes", "no"], "no"),
        ("It is the red circle.", ["red circle", "blue star"], "red circle"),
        ("2", ["yes", "no"], None),
        ("", ["yes", "no"], None),
    ],
)
def test_answers_are_read_from_sentences(text, candidates, read):
    assert card_answer(text, candidates) == read


def test_misread_words_are_answers():
    assert read_word('The word is "cat".') == "cat"
    assert read_word("cot") == "cot" and read_word(" ") is None


def test_objects_are_named_by_colour_and_shape():
    said = "A red circle, two Grey crosses and a blue thing left of a pink star."
    assert named_objects(said) == ["red circle", "gray cross", "pink star"]


def test_whoever_knows_scores_one_by_every_road():
    for road in ("generate", "loglikelihood"):
        metrics = score(Knows(road, *(["sentences"] * (road != "generate"))), benchmarks())
        for name in ("reading", "reasoning", "retrieval", "hallucination"):
            assert metrics[f"card_{name}/accuracy"]["value"] == 1.0, (road, name)
        assert ("card_generation/object_f1" in metrics) == (road == "generate")
        assert metrics["card_retrieval/accuracy"]["scorer"] in ("choice", "loglikelihood_pmi")
        assert metrics["card_retrieval/accuracy"]["chance"] == pytest.approx(0.1)
    assert metrics["card_reasoning/accuracy/comparison"]["n"] == 3 * SIZE
    assert metrics["card_reasoning/accuracy/hard"]["n"] == 3 * SIZE


def test_generation_counts_what_is_named_and_invented():
    metrics = score(Knows("generate"), benchmarks())
    assert metrics["card_generation/object_f1"]["value"] == 1.0
    assert metrics["card_generation/chair_i"]["value"] == 0.0
    assert metrics["card_generation/cider_d"]["value"] > 0.5
    wrong = Knows("generate", says=lambda s: f"{s.meta['there'][0]} and a mauve cat, a white ring")
    chosen = {"card_generation": benchmarks()["card_generation"]}
    made = score(wrong, chosen)
    assert made["card_generation/chair_i"]["value"] == pytest.approx(0.5, abs=0.02)
    easy = made["card_generation/object_f1/easy"]  # 1 of 2 mentions, 1 of 1 objects
    assert easy["value"] == pytest.approx(2 / 3, abs=0.03)


def test_a_constant_model_scores_chance_and_shows_its_bias():
    metrics = score(Knows("generate", says=lambda s: "yes"), benchmarks(), blind="all")
    entry = metrics["card_hallucination/accuracy"]
    assert entry["value"] == entry["blind"] == entry["chance"] == 0.5
    assert entry["uses_images"] is False
    assert metrics["card_hallucination/yes_ratio"]["value"] == 1.0
    assert metrics["card_reading/accuracy"]["value"] == 0.0
    assert metrics["card_reading/cer"]["value"] > 0.7


def test_what_a_model_cannot_do_is_left_out():
    ranks = Knows("loglikelihood", "sentences")
    results = evaluate(ranks, benchmarks(), None, blind="none", progress=False)
    assert list(results["left_out"]) == ["card_generation"]
    assert {key.split("/")[0] for key in results["metrics"]} == set(benchmarks()) - {
        "card_generation"
    }


def test_the_choice_of_benchmarks_composes(capsys):
    from triptych.bundle import compose_preset
    from triptych.evaluation.command import build_benchmarks

    cfg = compose_preset("llava", ["benchmark=[card]", "benchmark.card_reading.samples.size=2"])
    built, left_out = build_benchmarks(cfg.benchmark)
    assert list(built) == [f"card_{a}" for a in ABILITIES]
    assert len(built["card_reading"].samples) == 6 and not left_out
    assert json.dumps(built["card_retrieval"].samples[0].candidates)

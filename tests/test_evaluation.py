"""The evaluator: baselines, plans, records and galleries, with models that need no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.readers import EasyVQA
from triptych.evaluation.baselines import Prior, permute_images
from triptych.evaluation.benchmark import SUBSETS, AnswerBenchmark
from triptych.evaluation.gallery import draw_gallery
from triptych.evaluation.parsers import exact_answer, mentioned_answer
from triptych.evaluation.planning import image_subset, pieces, plan, row_tokens
from triptych.evaluation.predictor import Score
from triptych.evaluation.records import format_table, merge_results
from triptych.evaluation.runner import evaluate
from triptych.evaluation.scorers import Likelihood, Outcome
from triptych.types import DataError, ImageRef, Sample, TriptychError, assistant, user

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def pictures(count: int) -> list[tuple[str, ImageRef]]:
    """Pictures of one colour each, in turn, with a shade of their own."""
    made = []
    for i in range(count):
        name = list(COLORS)[i % 3]
        picture = Image.new("RGB", (16, 16), COLORS[name])
        picture.putpixel((0, 0), (i % 256, i // 256, 7))
        made.append((name, ImageRef.from_picture(picture, f"p{i}.png")))
    return made


def questions(count: int = 12, split: str = "test", skew: int = 0) -> list[Sample]:
    """Three questions a picture: its colour, whether it is red, and one that needs no picture."""
    samples = []
    for i, (color, ref) in enumerate(pictures(count)):
        asked = [
            ("what colour is it?", color, list(COLORS), "colour"),
            ("is it red?", "yes" if color == "red" else "no", ["yes", "no"], "yes_no"),
            ("is it a picture?", "yes", ["yes", "no"], "yes_no"),
        ]
        for k, (question, answer, candidates, kind) in enumerate(asked):
            messages = [user(question, images=1), assistant(answer)]
            name = f"{split}/{i}-{k}"
            meta = {"type": kind}
            samples.append(
                Sample(messages, [ref], answer, candidates, id=name, cluster=f"{i}", meta=meta)
            )
    return samples + samples[:3] * skew


class Eyes:
    """A perfect model of these pictures: looks at the last pixel, and reads the question."""

    def __init__(self, batch_size: int = 8, capabilities: Sequence[str] = ("generate",)) -> None:
        self.batch_size, self.capabilities = batch_size, frozenset(capabilities)
        self.vision_calls = self.generated_tokens = 0
        self.asked: list[int] = []

    def generate(self, samples: Sequence[Sample], **decoding: object) -> list[str]:
        self.asked.append(len(samples))
        self.vision_calls += len({s.images[0].key for s in samples})
        self.generated_tokens += len(samples)
        return [f" {self.see(sample).capitalize()}.\n" for sample in samples]

    def see(self, sample: Sample) -> str:
        pixel = sample.images[0].open().getpixel((15, 15))
        color = next(name for name, value in COLORS.items() if value == pixel)
        question = sample.prompt[-1]["content"][-1]["text"]
        if question.startswith("what"):
            return color
        return "yes" if "picture" in question or color == "red" else "no"

    def loglikelihood(
        self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        sums = [
            [0.0 if c == self.see(s) else -2.0 for c in cs]
            for s, cs in zip(samples, candidates, strict=True)
        ]
        return [[Score(value, 1, 1) for value in row] for row in sums]


class Constant(Eyes):
    """Says one word, whatever it is asked."""

    def see(self, sample: Sample) -> str:
        return "yes"


def bench(count: int = 12, **options: object) -> AnswerBenchmark:
    samples = questions(count)
    return AnswerBenchmark(samples, questions(9, "train"), slice_by="type", **options)


# --- one evaluation -----------------------------------------------------------------------------


def test_results_hold_scores_and_baselines(tmp_path: Path) -> None:
    results = evaluate(Eyes(), {"toy": bench()}, tmp_path, progress=False)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results) == ["metrics"]
    metrics = results["metrics"]
    assert set(metrics) == {"toy/accuracy", "toy/accuracy/colour", "toy/accuracy/yes_no"}
    whole, colour = metrics["toy/accuracy"], metrics["toy/accuracy/colour"]
    assert (whole["value"], whole["n"], whole["unparsed"]) == (1.0, 36, 0.0)
    # prior: red (first of a three-way tie), "no" (2 of 3), "yes" (always) -> 1/3, 2/3, 1
    assert whole["prior"] == pytest.approx(2 / 3, abs=1e-6) and whole["prior_n"] == 36
    assert colour["prior"] == pytest.approx(1 / 3, abs=1e-6)
    assert colour["chance"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["toy/accuracy/yes_no"]["chance"] == 0.5
    assert whole["blind_n"] == 36 and whole["blind"] < 1
    assert whole["prior_low"] <= whole["prior"] <= whole["prior_high"]
    assert (whole["scorer"], whole["parser"]) == ("generate", "exact_answer")
    assert colour["uses_images"] is True and 0.7 < colour["low"] < 1.0


def test_a_constant_model_does_not_use_images() -> None:
    entry = evaluate(Constant(), {"toy": bench()}, None, progress=False)["metrics"]
    assert entry["toy/accuracy"]["uses_images"] is False
    assert entry["toy/accuracy"]["value"] == entry["toy/accuracy"]["blind"]
    assert entry["toy/accuracy/colour"]["unparsed"] == 1.0
    assert entry["toy/accuracy/colour"]["value"] == 0.0


def test_the_outcome_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    samples = questions()
    order = np.random.default_rng(0).permutation(len(samples))
    mixed = AnswerBenchmark([samples[i] for i in order], samples, slice_by="type")
    for size in (1, 5, 64):
        model = Eyes(size)
        evaluate(model, {"toy": mixed}, tmp_path / str(size), progress=False)
        timing = json.loads((tmp_path / f"{size}/timing.json").read_text())["benchmarks"]["toy"]
        assert timing["vision_calls"] == timing["distinct_images"] == 12, "encode each image once"
        assert timing["questions"] == timing["generated_tokens"] == 36
        assert timing["blind"]["vision_calls"] == 12
        assert max(model.asked) <= max(size, 3)
    for name in ("results.json", "samples.parquet", "gallery.html", "gallery.png"):
        assert len({(tmp_path / f"{size}" / name).read_bytes() for size in (1, 5, 64)}) == 1, name


def test_samples_are_a_row_a_question(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    evaluate(Eyes(), {"toy": bench(blind_subset=None)}, tmp_path, progress=False)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == [s.id for s in questions()]
    first = rows[0]
    assert (first["question"], first["gold"]) == ("what colour is it?", "red")
    assert (first["raw_output"], first["parsed"], first["correct"]) == (" Red.\n", "red", 1.0)
    assert (first["cluster_id"], first["image"], first["slice"]) == ("0", "p0.png", "colour")
    assert (first["benchmark"], first["scorer"], first["prior"]) == ("toy", "generate", "red")
    assert first["blind"] in COLORS


def test_limit_takes_seeded_whole_images(tmp_path: Path) -> None:
    model = Eyes()
    toy = {"toy": bench(40)}
    entry = evaluate(model, toy, tmp_path, limit=30, blind="none", progress=False)["metrics"]
    assert entry["toy/accuracy"]["n"] == 30 and model.vision_calls == 10
    assert entry["toy/accuracy"]["blind"] is None and entry["toy/accuracy"]["uses_images"] is None
    drawn = {
        tuple(image_subset([s.cluster for s in questions(40)], 30, seed)) for seed in (0, 0, 1)
    }
    assert len(drawn) == 2, "the seed decides"


def test_the_scorer_follows_what_the_model_can_do() -> None:
    both = evaluate(Eyes(capabilities=["loglikelihood"]), {"toy": bench()}, None, progress=False)
    assert both["metrics"]["toy/accuracy"]["scorer"] == "loglikelihood"
    assert both["metrics"]["toy/accuracy"]["value"] == 1.0
    with pytest.raises(TriptychError, match="needs a model that can do generate or loglikelihood"):
        evaluate(Eyes(capabilities=["embed_images"]), {"toy": bench()}, None, progress=False)


def test_equal_likelihoods_choose_nothing() -> None:
    class Flat(Eyes):
        def loglikelihood(self, samples, candidates):
            return [[Score(-1.0, 1, 1) for _ in names] for names in candidates]

    outcome = Likelihood().ask(Flat(), questions(1))[0]
    assert (outcome.raw, outcome.parsed, outcome.scores) == ("", None, [-1.0] * 3)
    assert AnswerBenchmark(questions(1)).record(questions(1)[0], outcome)["parsed"] is None
    with pytest.raises(TriptychError, match="'x' has no closed list"):
        Likelihood().ask(Flat(), [Sample([user("?")], target="a", id="x")])


def test_mistakes_are_said_in_a_sentence() -> None:
    with pytest.raises(TriptychError, match="blind='some' is unknown"):
        evaluate(Eyes(), {"toy": bench()}, None, blind="some")
    with pytest.raises(TriptychError, match="limit=0"):
        evaluate(Eyes(), {"toy": bench()}, None, limit=0)
    with pytest.raises(DataError, match="no sample"):
        evaluate(Eyes(), {"toy": AnswerBenchmark([])}, None)
    with pytest.raises(DataError, match="'test/0-0'; records"):
        evaluate(Eyes(), {"toy": AnswerBenchmark(questions(2, skew=1))}, None)
    with pytest.raises(TriptychError, match="blind_subset 'nowhere'"):
        AnswerBenchmark([], blind_subset="nowhere")
    with pytest.raises(TriptychError, match="'q' has no target"):
        AnswerBenchmark([]).record(Sample([user("?")], id="q"), Outcome("a"))


# --- baselines ----------------------------------------------------------------------------------


def test_prior_counts_the_training_split_alone() -> None:
    def asked(question: str, answer: str) -> Sample:
        return Sample([user(question, images=1), assistant(answer)], target=answer)

    train = [asked("q", "b"), asked("q", "a"), asked("q", "b"), asked("r", "d"), asked("r", "c")]
    prior = Prior([*train, *(asked(q, "z") for q in "stu")])
    assert prior.guess(asked("q", "?")) == "b"
    assert prior.guess(asked("r", "?")) == "d", "ties go to the first seen"
    assert prior.guess(asked("never seen", "?")) == "z"


def test_prior_of_easy_vqa() -> None:
    prior = Prior(EasyVQA("train"))
    test = EasyVQA("test")
    right = sum(prior.guess(sample) == sample.target for sample in test)
    assert right == 6_481  # 67.0 %


def test_permuted_images_never_stay() -> None:
    samples = questions(7)
    for seed in range(20):
        permuted = permute_images(samples, seed)
        moves = {(a.images[0].key, b.images[0].key) for a, b in zip(samples, permuted, strict=True)}
        assert len(moves) == 7, "questions that shared an image share one again"
        assert all(a != b for a, b in moves)
        assert {a for a, _ in moves} == {b for _, b in moves}, "a permutation"
        assert [s.id for s in samples] == [s.id for s in permuted]
    assert samples[0].images[0].name == "p0.png", "the samples themselves are untouched"
    assert permute_images(questions(1), 0) == []


def test_single_image_sets_have_no_blind_score(tmp_path: Path) -> None:
    entry = evaluate(Eyes(), {"toy": bench(1)}, tmp_path, progress=False)["metrics"]["toy/accuracy"]
    assert (entry["value"], entry["blind"], entry["blind_n"]) == (1.0, None, None)
    assert entry["uses_images"] is None
    # Wilson's interval of one success in one image: 1 / (1 + 1.959964^2)
    assert entry["low"] == pytest.approx(0.206549, abs=1e-6) and entry["high"] == 1.0


def test_the_committed_subset_is_the_rule() -> None:
    test = EasyVQA("test")
    ids = (SUBSETS / "easy_vqa_blind.txt").read_text().split()
    assert len(ids) == len(set(ids)) == 1_000
    assert ids == [test[i].id for i in image_subset(test.clusters, 1_000, seed=0)]


def test_the_blind_run_takes_the_committed_ids(tmp_path: Path) -> None:
    chosen = tmp_path / "ids.txt"
    chosen.write_text("test/4-1\ntest/0-0\ntest/1-0\n")
    toy = {"toy": bench(blind_subset=str(chosen))}
    few = evaluate(Eyes(), toy, None, progress=False)["metrics"]["toy/accuracy"]
    every = evaluate(Eyes(), toy, None, blind="all", progress=False)["metrics"]["toy/accuracy"]
    assert (few["blind_n"], every["blind_n"]) == (3, 36)
    # one cycle over pictures in red, green and green shows two of them in the other colour
    assert few["blind"] < 1


def test_a_committed_subset_is_all_that_is_asked(tmp_path: Path) -> None:
    chosen = tmp_path / "ids.txt"
    chosen.write_text("test/4-1\ntest/0-0\n")
    toy = AnswerBenchmark(questions(), subset=str(chosen), blind_subset=str(chosen))
    result = evaluate(Eyes(), {"toy": toy}, None, progress=False)["metrics"]["toy/accuracy"]
    assert (result["n"], result["blind_n"], result["value"]) == (2, 2, 1.0)
    assert [sample.id for sample in toy.samples] == ["test/0-0", "test/4-1"]
    chosen.write_text("test/0-0\ntrain/0-0\n")
    with pytest.raises(DataError, match="1 samples .*first: train/0-0"):
        AnswerBenchmark(questions(), subset=str(chosen))


# --- plans, parsers, tables ---------------------------------------------------------------------


def test_plan_keeps_an_images_questions_together() -> None:
    a, b = (ref for _, ref in pictures(2))
    images = [[a], [b], [a], [], [b], [a], []]
    samples = [Sample([user("?")], refs, id=str(i)) for i, refs in enumerate(images)]
    assert list(plan(samples, 1)) == [[0, 2, 5], [1, 4], [3], [6]]
    assert list(plan(samples, 4)) == [[0, 2, 5], [1, 4, 3, 6]]
    assert list(plan(samples, 64)) == [[0, 2, 5, 1, 4, 3, 6]]


def test_long_texts_run_in_smaller_batches_longest_first() -> None:
    refs = [ref for _, ref in pictures(6)]
    words = ["?", "?", "?" * 3 * 500, "?", "?" * 3 * 5000, "?"]  # about a token for three letters
    samples = [
        Sample([user(text, 1)], [ref], id=f"{i}")
        for i, (text, ref) in enumerate(zip(words, refs, strict=True))
    ]
    assert [row_tokens(s) for s in samples] == [9, 9, 508, 9, 5008, 9]
    # 4 x 512 tokens: the longest runs alone, and four rows of 508 fit
    assert list(plan(samples, 4)) == [[4], [2, 0, 1, 3], [5]]
    # an image of 600 tokens leaves room for three of four such rows
    tokens = [row_tokens(s, 600) for s in samples]
    assert list(plan(samples, 4, tokens)) == [[4], [2], [0, 1, 3], [5]]
    assert row_tokens(samples[0], 600, ["yes", "no"]) == 600 + 2 * (9 + 9)
    # all questions of one image stay a batch, whose pieces fit
    same = [replace(s, images=refs[:1]) for s in samples]
    assert list(plan(same, 4)) == [[0, 1, 2, 3, 4, 5]]
    assert list(pieces(same, 4, [600] * 6)) == [[0, 1, 2], [3, 4, 5]]
    assert list(pieces(same, 1, [600] * 6)) == [[i] for i in range(6)]


def test_image_subset_has_the_asked_size() -> None:
    clusters = [f"{i // 3}" for i in range(30)]
    for size in (1, 7, 30, 99):
        rows = image_subset(clusters, size, 0)
        assert len(rows) == min(size, 30) and rows == sorted(set(rows))
        cut = [c for c in set(clusters) if 0 < sum(clusters[r] == c for r in rows) < 3]
        assert len(cut) == (0 if size % 3 == 0 else 1)


@pytest.mark.parametrize(
    ("text", "candidates", "exact", "mentioned"),
    [
        (" Blue.\n", ["blue", "red"], "blue", "blue"),
        ("It is blue.", ["blue", "red"], None, "blue"),
        ("blue or red", ["blue", "red"], None, None),
        ("bluegreen", ["blue", "green"], None, None),
        ("고양이。", ["고양이", "개"], "고양이", "고양이"),
        ("\u1100\u1161", ["\uac00"], "\uac00", "\uac00"),  # decomposed and composed Hangul
        ("", ["yes"], None, None),
        ("...", [], None, None),
        ("A  Red car!", [], "a red car", "a red car"),
        ("purple", ["blue"], None, None),
    ],
)
def test_parsers(
    text: str, candidates: list[str], exact: str | None, mentioned: str | None
) -> None:
    assert exact_answer(text, candidates) == exact
    assert mentioned_answer(text, candidates) == mentioned


def test_before_and_after_in_one_table(tmp_path: Path) -> None:
    before = evaluate(Constant(), {"toy": bench()}, None, progress=False)
    after = evaluate(Eyes(), {"toy": bench()}, None, progress=False)
    lines = format_table({"before": before, "after": after}).splitlines()
    assert lines[0].split() == ["metric", "n", "before", "after", "prior", "blind", "chance"]
    whole = next(line for line in lines if line.startswith("toy/accuracy "))
    assert "44.44 [44.44, " not in whole and "100.00 [75.75, 100.00]" in whole
    assert f"{100 * before['metrics']['toy/accuracy']['value']:.2f} [" in whole
    path = tmp_path / "results.json"
    merge_results(path, {"metrics": {"other/x": {"value": 1.0}, "toy/accuracy": {"value": 0.0}}})
    merged = merge_results(path, after)["metrics"]
    assert merged["other/x"] == {"value": 1.0} and merged["toy/accuracy"]["value"] == 1.0
    assert json.loads(path.read_text())["metrics"] == merged


# --- gallery ------------------------------------------------------------------------------------


def test_gallery_is_self_contained_and_escaped(tmp_path: Path) -> None:
    class Rude(Eyes):
        def see(self, sample: Sample) -> str:
            return "<script>alert(1)</script>"

    evaluate(Rude(), {"toy": bench()}, tmp_path, progress=False)
    page = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page and page.count('src="data:image/png;base64,') == 48
    assert "24 of 36 failures" in page and "24 of 36 at random" in page
    with Image.open(tmp_path / "gallery.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 600


def test_the_gallery_shows_what_was_answered_before(tmp_path: Path) -> None:
    class Untrained(Eyes):
        def see(self, sample: Sample) -> str:
            return "a <cat>"

    toy = {"toy": bench()}
    evaluate(Untrained(), toy, tmp_path / "before", blind="none", progress=False)
    evaluate(Eyes(), toy, tmp_path, before=tmp_path / "before", progress=False)
    page = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert page.count('<dd class="before">') == page.count('<dd class="answer">') > 0
    assert "A &lt;cat&gt;." in page
    assert "before" not in (tmp_path / "before" / "gallery.html").read_text(encoding="utf-8")


def test_gallery_draws_any_text_and_shape() -> None:
    wide = ImageRef.from_picture(Image.new("RGB", (300, 20), "red"))
    record = {
        "benchmark": "b",
        "sample_id": "s",
        "question": "무엇이 보입니까? " + "longword" * 40,
        "gold": "고양이\n🐈",
        "raw_output": "",
        "correct": 0.0,
    }
    sheet = draw_gallery({"of 1": [record], "none": []}, {"s": [wide, wide, wide]})
    red = np.array(sheet)[..., :].reshape(-1, 3)
    assert ((red == (255, 0, 0)).all(1)).sum() == 3 * 64 * 4

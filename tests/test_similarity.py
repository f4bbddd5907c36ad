"""Retrieval, zero-shot, linear probe and closed answers, with a model whose vectors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.embedding import ProbeBenchmark, RetrievalBenchmark, ZeroShotBenchmark
from triptych.evaluation.records import format_table
from triptych.evaluation.runner import evaluate
from triptych.evaluation.similarity import Similarity
from triptych.types import ImageRef, Sample, TriptychError, assistant, user

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Eyes:
    """Embeds a picture as its colour, and a text as the colour it names last."""

    batch_size, vision_calls, generated_tokens = 4, 0, 0
    capabilities = frozenset({"embed", "features"})

    def embed_images(self, refs):
        self.vision_calls += len(refs)
        rows = [torch.tensor(ref.open().getpixel((0, 0)), dtype=torch.float32) for ref in refs]
        return torch.nn.functional.normalize(torch.stack(rows) - 60, dim=-1)[:, None]

    def embed_texts(self, texts):
        named = [[c for c in COLORS if c in text.split()] for text in texts]
        rows = [torch.tensor(COLORS[n[-1]], dtype=torch.float32) for n in named]
        return torch.nn.functional.normalize(torch.stack(rows) - 60, dim=-1)

    def features(self, refs):
        return self.embed_images(refs)[:, 0]


class Constant(Eyes):
    """Everything is one point."""

    def embed_images(self, refs):
        return torch.ones(len(refs), 1, 3) / 3**0.5

    def embed_texts(self, texts):
        return torch.ones(len(texts), 3) / 3**0.5


def picture(color: str, shade: int = 0) -> ImageRef:
    made = Image.new("RGB", (2, 2), COLORS[color])
    made.putpixel((1, 1), (shade, shade, shade))
    return ImageRef.from_picture(made, f"{color}{shade}")


def pair(color: str, caption: str, shade: int = 0, name: str = "") -> Sample:
    ref = picture(color, shade)
    return Sample([user("", 1), assistant(caption)], [ref], id=name or caption, cluster=ref.key)


def score(model, benchmark) -> dict:
    return evaluate(model, {"b": benchmark}, None, progress=False)["metrics"]


def test_retrieval_counts_any_caption_and_states_chance_and_ceiling():
    samples = [pair("red", "all red"), pair("red", "so red"), pair("blue", "it is blue")]
    metrics = score(Eyes(), RetrievalBenchmark(samples))
    assert metrics["b/i2t_r1"]["value"] == metrics["b/t2i_r1"]["value"] == 1.0
    assert metrics["b/i2t_r1"]["n"] == 2 and metrics["b/t2i_r1"]["n"] == 3
    assert metrics["b/i2t_r1"]["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["b/t2i_r1"]["chance"] == 0.5
    assert metrics["b/i2t_r1"]["ceiling"] == 1.0 and metrics["b/mean_recall"]["value"] == 1.0
    assert "ceiling" in format_table({"after": {"metrics": metrics}}).splitlines()[0]


def test_equal_captions_of_different_images_lower_the_ceiling():
    samples = [pair("red", "red", 0, "a"), pair("red", "red", 9, "b"), pair("blue", "blue")]
    metrics = score(Eyes(), RetrievalBenchmark(samples))
    expected = (0.5 + 0.5 + 1) / 3  # two pictures fit "red" equally well
    for side in ("i2t", "t2i"):
        entry = metrics[f"b/{side}_r1"]
        assert entry["ceiling"] == pytest.approx(expected, abs=1e-6)
        assert entry["value"] == pytest.approx(expected, abs=1e-6)


class Table(Eyes):
    """Cosines written down: the vector of image i is its row, that of caption j the j-th unit."""

    rows = ((0.9, 0.1, 0.3, 0.8), (0.2, 0.3, 0.8, 0.1), (0.95, 0.4, 0.5, 0.6), (0.1, 0.7, 0.2, 0.0))

    def embed_images(self, refs):
        self.vision_calls += len(refs)
        return torch.tensor([self.rows["abcde".index(ref.name)] for ref in refs])[:, None]

    def embed_texts(self, texts):
        return torch.eye(4)[["abcde".index(text) for text in texts]]


def test_folds_are_galleries_of_their_own_and_are_averaged():
    samples = []
    for i, name in enumerate("abcd"):
        made = Image.new("RGB", (2, 2), (i, 0, 0))
        ref = ImageRef.from_picture(made, name)
        samples.append(Sample([user("", 1), assistant(name)], [ref], id=name, cluster=name))
    model = Table()
    metrics = score(model, RetrievalBenchmark(samples, fold_size=2))
    assert model.vision_calls == 4, "each image is encoded once for all galleries"
    values = {key.partition("/")[2]: entry["value"] for key, entry in metrics.items()}
    # of four: images a, b, c, d find captions a, c, a, b; captions find images c, d, b, a
    assert (values["i2t_r1"], values["t2i_r1"]) == (0.25, 0.0)
    # of a, b: both images are right, and both captions; of c, d: neither image, and caption c
    assert metrics["b/i2t_r1_2"]["folds"] == [1.0, 0.0]
    assert metrics["b/t2i_r1_2"]["folds"] == [1.0, 0.5]
    assert (values["i2t_r1_2"], values["t2i_r1_2"]) == (0.5, 0.75)
    assert values["i2t_r5_2"] == values["t2i_r10_2"] == 1.0
    assert values["mean_recall_2"] == pytest.approx((0.5 + 0.75 + 4) / 6, abs=1e-6)
    fold = metrics["b/t2i_r1_2"]
    assert (fold["chance"], fold["n"], fold["rule"][-13:]) == (0.5, 4, "mean of folds")
    assert 0 <= fold["low"] < 0.75 < fold["high"] <= 1
    assert metrics["b/i2t_r1"]["chance"] == 0.25
    alone = score(Table(), RetrievalBenchmark(samples))
    assert {k: alone[k]["value"] for k in alone} == {k: metrics[k]["value"] for k in alone}
    short = score(Table(), RetrievalBenchmark(samples[:3], fold_size=2))
    assert not any(key.endswith("_2") for key in short), "one fold is no average"


def test_one_point_for_everything_scores_chance_in_any_order():
    samples = [pair(c, f"{c} {i}", i) for i, c in enumerate(["red", "green", "blue", "white"] * 5)]
    order = np.random.default_rng(0).permutation(20)
    for rows in (samples, [samples[i] for i in order]):
        metrics = score(Constant(), RetrievalBenchmark(rows))
        for key in ("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r10"):
            entry = metrics[f"b/{key}"]
            assert entry["value"] == pytest.approx(entry["chance"], abs=1e-6)
        labels = [labelled(c, i) for i, c in enumerate(["red", "green", "blue", "white"] * 5)]
        assert score(Constant(), ZeroShotBenchmark(labels))["b/accuracy"]["value"] == 0.25


def labelled(color: str, shade: int) -> Sample:
    sample = pair(color, color, shade, f"{color}{shade}")
    sample.target, sample.candidates = color, list(COLORS)
    return sample


def test_zero_shot_averages_prompts_and_classes():
    samples = [labelled("red", i) for i in range(3)] + [labelled("blue", 5)]
    metrics = score(Eyes(), ZeroShotBenchmark(samples, templates=["a {}", "it is {}"]))
    assert metrics["b/accuracy"]["value"] == metrics["b/mean_class_recall"]["value"] == 1.0
    assert metrics["b/accuracy"]["chance"] == 0.25 and "b/accuracy_top5" not in metrics
    samples[0].images = samples[3].images  # one of three reds is wrong
    metrics = score(Eyes(), ZeroShotBenchmark(samples, templates=["a {}"]))
    assert metrics["b/accuracy"]["value"] == 0.75
    assert metrics["b/mean_class_recall"]["value"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert metrics["b/accuracy"]["blind"] is not None


def test_the_linear_probe_learns_from_the_training_images():
    pytest.importorskip("sklearn")
    train = [labelled(c, i) for i, c in enumerate(list(COLORS) * 5)]
    test = [labelled(c, 100 + i) for i, c in enumerate(COLORS)]
    metrics = score(Eyes(), ProbeBenchmark(test, train, c=100.0))
    assert metrics["b/accuracy"]["value"] == 1.0 and metrics["b/accuracy"]["c"] == 100.0
    assert metrics["b/accuracy"]["recipe"] and metrics["b/accuracy"]["scorer"] == "linear_probe"
    assert metrics["b/accuracy"]["blind"] is None


def question(color: str, shade: int, text: str = "what color is it?") -> Sample:
    sample = labelled(color, shade)
    sample.messages = [user(text, 1), assistant(color)]
    return sample


def test_closed_answers_are_read_as_captions():
    samples = [question(c, i) for i, c in enumerate(list(COLORS) * 2)]
    entry = score(Eyes(), AnswerBenchmark(samples, samples))["b/accuracy"]
    assert (entry["value"], entry["scorer"], entry["chance"]) == (1.0, "similarity", 0.25)
    assert entry["prior"] == 0.25 and entry["blind"] is not None
    assert score(Constant(), AnswerBenchmark(samples))["b/accuracy"]["value"] == 0.0  # strict
    assert Similarity().captions(samples[0])[0] == "what color is it? red"


def test_each_distinct_image_is_embedded_once():
    samples = [question("red", 0), question("blue", 0), question("red", 0, "which color")]
    for i, sample in enumerate(samples):
        sample.id = str(i)
    model = Eyes()
    evaluate(model, {"b": AnswerBenchmark(samples)}, None, blind="none", progress=False)
    assert model.vision_calls == 2


def test_open_answers_and_several_images_are_refused():
    open_ended = question("red", 0)
    open_ended.candidates = []
    with pytest.raises(TriptychError, match="no closed list"):
        score(Eyes(), AnswerBenchmark([open_ended, question("blue", 1)]))
    two = question("red", 0)
    two.images = two.images * 2
    with pytest.raises(TriptychError, match="has 2 images"):
        score(Eyes(), AnswerBenchmark([two, question("blue", 1)]))

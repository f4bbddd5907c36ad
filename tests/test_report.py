"""The report: every rule on a record made for it, escaping, and one run from the command line."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf
from PIL import Image

from triptych.api import Loaded
from triptych.data.shapes import Shapes
from triptych.evaluation.report import __main__ as command
from triptych.evaluation.report.gather import ask_folder, find_failures
from triptych.evaluation.report.rules import UNEXPLAINED, Case, Lean, explain
from triptych.types import DataError, Sample

EVEN = Lean(50, 100, 0.5)


def case(gold: str, raw: str, parsed: str | None = "", areas=None, tags=(), **more) -> Case:
    names = {"candidates"} & more.keys()
    sample = Sample([], tags=list(tags), candidates=more.pop("candidates") if names else [])
    parsed = raw if parsed == "" else parsed
    record = {"gold": gold, "raw_output": raw, "parsed": parsed, "question": "", **more}
    return Case(record, sample, areas or {})


# --- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "lean", "name", "support"),
    [
        (case("blue", "It is blue, I think", None), EVEN, "format", 'the text holds "blue"'),
        (case("two", "2 of them", None), EVEN, "format", 'the text holds "two"'),
        (case("red", "blue", blind="blue"), EVEN, "language prior", 'says "blue" too'),
        (case("no", "yes"), Lean(83, 100, 0.5), "yes-bias", "83 % of 100"),
        (case("three", "two"), EVEN, "counting", "counts 2 where there are 3, off by 1"),
        (case("4", "two"), EVEN, "counting", "off by 2"),
        (case("cat", "cot", question="which word?"), EVEN, "OCR near miss", "67 %"),
        (case("red", "blue", tags=["red ring"]), EVEN, "object not there", "blue"),
        (
            case("no", "yes", tags=["red ring"], question="is there a blue star in the image?"),
            EVEN,
            "object not there",
            "blue star",
        ),
        (case("x", "y", invented=["red cat"]), EVEN, "object not there", "red cat"),
        (
            case("red", "teal", areas={"red ring": 0.02}, question="what color is the ring?"),
            EVEN,
            "small object",
            "the red ring takes 2.0 %",
        ),
        (
            case("b", "a", candidates=["a", "b", "c"], scores=[0.5, 0.4, 0.1]),
            EVEN,
            "ranking",
            "number 2 of 3, 0.1 behind",
        ),
    ],
)
def test_a_rule_names_what_supports_it(made, lean, name, support):
    found = explain(made, lean)
    assert name in found and support in found[name], found


@pytest.mark.parametrize(
    ("made", "lean"),
    [
        (case("red", "blue", tags=["red ring", "blue star"]), EVEN),
        (case("red", "", None), EVEN),
        (case("red", "teal", blind="blue"), EVEN),
        (case("no", "yes"), Lean(52, 100, 0.5)),
        (case("yes", "no"), Lean(90, 100, 0.5)),
        (case("cat", "dog", question="which word?"), EVEN),
        (case("cat", "cot", question="which animal?"), EVEN),
        (case("circle", "cross"), EVEN),
        (case("a", "b", candidates=["a", "b"], scores=[0.1, 0.9]), EVEN),
    ],
)
def test_rules_are_silent_without_support(made, lean):
    assert explain(made, lean) == {}


def test_a_small_object_must_be_the_one_that_is_asked_about():
    asked = case("red", "teal", question="what color is the ring?")
    asked.areas = {"red ring": 0.2, "blue star": 0.01}
    assert explain(asked, EVEN) == {}


def test_the_lean_counts_yes_and_no_alone():
    rows = [{"gold": "yes", "parsed": "yes"}] * 20 + [{"gold": "no", "parsed": "yes"}] * 20
    lean = Lean.of([*rows, {"gold": "red", "parsed": "yes"}])
    assert (lean.said, lean.asked, lean.right, lean.toward()) == (40, 40, 0.5, "yes")
    assert Lean.of([]).toward() is None


# --- the whole report ---------------------------------------------------------------------------

BAD = "<script>alert(1)</script> | [x](javascript:1)"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    scenes = Shapes("test", 11)
    for i in range(11):
        scenes.image(i).open().save(folder / f"{i:02d}.png")
    Image.effect_noise((900, 700), 60).convert("RGB").save(folder / "00_large.jpg")
    (folder / "00_a_broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def run(tmp_path, vlm, monkeypatch):
    """A run directory whose model is the tiny one, with the records of an evaluation."""
    from triptych.evaluation.benchmark import AnswerBenchmark
    from triptych.evaluation.model_predictor import ModelPredictor
    from triptych.evaluation.runner import evaluate

    node = {
        "_target_": "triptych.evaluation.benchmark.AnswerBenchmark",
        "samples": {"_target_": "triptych.data.shapes.Shapes", "split": "test", "size": 12},
        "slice_by": "type",
    }
    cfg = OmegaConf.create({"model": {"name": "llava"}, "benchmark": {"shapes": node}})
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    processor = vlm.eval().processor()
    benchmark = AnswerBenchmark(Shapes("test", 12), slice_by="type")
    evaluate(ModelPredictor(vlm, processor), {"shapes": benchmark}, folder, progress=False)
    monkeypatch.setattr("triptych.api.load", lambda name: Loaded(vlm, processor, cfg))
    return folder


def test_ten_images_three_prompts_and_five_failures(run, images, capsys):
    prompts = f"what is this?|{BAD.replace('|', '')}|how many?"
    words = [f"run={run}", f"images={images}", f"prompts={prompts}", "max_new_tokens=4"]
    assert command.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "skipped" in said and "00_a_broken.png" in said
    page = (run / "report" / "report.html").read_text()
    text = (run / "report" / "report.md").read_text()
    assert "10 images, 3 prompts each" in page and "10 images, 3 prompts each" in text
    rows = re.findall(r"<tr><td><img.*?</tr>", page, re.DOTALL)
    assert len(rows) == 10 and all(row.count("<td>") == 4 for row in rows)
    assert page.count("<section>") == 8 and text.count("\n### ") == 8
    assert "hypothesis" in page and "data:image/png;base64," in page
    assert "<script>" not in page and "<script>" not in text
    assert len([line for line in text.splitlines() if line.startswith("| ![](pictures/")]) == 10
    pictures = {p.name: Image.open(p).size for p in (run / "report" / "pictures").iterdir()}
    assert max(max(size) for size in pictures.values()) == 320, "the large one is downsized"
    linked = set(re.findall(r"!\[\]\((pictures/[^)]+)\)", text))
    assert linked == {f"pictures/{name}" for name in pictures}


def test_failures_are_chosen_over_all_hypotheses(run):
    found = find_failures(run, run, 5)
    assert found.records == 12 and found.failures == sum(found.counts.values())
    assert len(found.cases) == min(5, found.failures) >= 5
    first = {case.first for case in found.cases}
    assert len(first) == min(5, len(found.counts))
    assert all(case.case.sample.images for case in found.cases)
    again = find_failures(run, run, 5)
    ids = [c.case.record["sample_id"] for c in found.cases]
    assert ids == [c.case.record["sample_id"] for c in again.cases]
    assert UNEXPLAINED not in first or not [
        c for c in found.cases if c.first == UNEXPLAINED and c.hypotheses
    ]


def test_a_model_that_only_embeds_ranks_the_pictures(images, vlm):
    import torch

    class Embeds:
        def parameters(self):
            return iter([torch.zeros(1)])

        def modules(self):
            return []

        def eval(self):
            return self

        def embed_images(self, batch):
            return torch.eye(len(batch))[:, None]

        def embed_texts(self, tokens):
            return torch.eye(4)[: len(tokens)]

    class Tokens(list):
        def to(self, device):
            return self

    processor = vlm.processor()
    processor.encode = lambda texts, longest: Tokens(texts)
    loaded = Loaded(Embeds(), processor, OmegaConf.create({"model": {"name": "clip"}}))
    asked, how = ask_folder(loaded, images, ["a", "b"], 4, 8)
    assert how.startswith("cosines") and len(asked) == 4
    assert asked[0].answers == ["cosine 1.000, number 1 of 4", "cosine 0.000, number 2 of 4"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=x"], "images= is missing"),
        (["run=x", "images=y", "colour=1"], "'colour=1' is no option"),
        (["run=x", "images=y", "count=0"], "count=0 must be a number"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_an_empty_folder_is_refused(tmp_path, vlm):
    (tmp_path / "x.png").write_bytes(b"")
    loaded = Loaded(vlm, vlm.processor(), OmegaConf.create({"model": {"name": "llava"}}))
    with pytest.raises(DataError, match="no readable image"):
        ask_folder(loaded, tmp_path, ["what?"], 3, 4)

"""Every public benchmark: its official layout is read, and made-up answers get known scores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixture_benchmarks import FILES, FIXTURES, build, options
from omegaconf import OmegaConf

from triptych.evaluation import captioning
from triptych.evaluation.baselines import question_of
from triptych.evaluation.metrics import cider_d, ptb_tokenize
from triptych.evaluation.predictor import Score
from triptych.evaluation.runner import evaluate
from triptych.evaluation.sets.documents import DocVQA, TextVQA
from triptych.evaluation.sets.ocr import Transcripts, Words
from triptych.evaluation.sets.pope import POPE
from triptych.evaluation.sets.vqa import VQA
from triptych.evaluation.wording import lettered, letters_of
from triptych.types import DataError, Sample, TriptychError


class Scripted:
    """Says what a table holds for a sample's id; `asked` keeps the prompts it saw."""

    def __init__(self, answers: dict[str, Any], capability: str = "generate") -> None:
        self.answers, self.capabilities = answers, frozenset({capability})
        self.batch_size, self.vision_calls, self.generated_tokens = 64, 0, 0
        self.asked: dict[str, str] = {}

    def generate(self, samples: Sequence[Sample], **decoding: object) -> list[str]:
        self.asked |= {s.id: question_of(s) for s in samples}
        return [self.answers[s.id] for s in samples]

    def loglikelihood(
        self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        return [[Score(float(v), 1, 1) for v in self.answers[s.id]] for s in samples]


def score(model: Scripted, benchmark: Any) -> dict[str, dict]:
    entries = evaluate(model, {"b": benchmark}, None, blind="none", progress=False)["metrics"]
    return {key.removeprefix("b/"): entry for key, entry in entries.items()}


def values(entries: dict[str, dict], *keys: str) -> list[float]:
    return [entries[key]["value"] for key in keys]


def close(*numbers: float) -> Any:
    return pytest.approx(numbers[0] if len(numbers) == 1 else list(numbers), abs=2e-6)


# --- short answers ------------------------------------------------------------------------------


def test_vqav2() -> None:
    said = ["Yes", "red", "Yes.", "one", "navy", " \n"]
    ids = [f"vqav2/{i}" for i in (1000, 1001, 2002, 2003, 3004, 4005)]
    benchmark, model = build("vqav2"), Scripted(dict(zip(ids, said, strict=True)))
    assert [s.id for s in benchmark.samples] == ids
    assert benchmark.samples.clusters[:3] == ["vqav2/1", "vqav2/1", "vqav2/2"]
    entries = score(model, benchmark)
    assert list(entries)[0] == "vqa_accuracy"
    # "Yes" meets ten equal "yes" and is not normalised (0); "Yes." meets 4 of 10 (1); navy 2 (0.6)
    slices = [f"vqa_accuracy/{name}" for name in ("yes_no", "number", "other")]
    assert values(entries, "vqa_accuracy", *slices) == close(3.6 / 6, 1 / 3, 1, 0.8)
    whole = entries["vqa_accuracy"]
    assert (whole["rule"], whole["n"], whole["chance"]) == ("official", 6, None)
    # prior: yes, blue, yes, yes, blue, yes; majority: yes to all
    assert [whole[k] for k in ("unparsed", "prior", "majority")] == close(1 / 6, 4 / 6, 0.5)
    assert model.asked[ids[0]] == (
        "Is the square red?\nAnswer the question using a single word or phrase."
    )
    assert question_of(benchmark.samples[0]) == "Is the square red?"
    lenient = build("vqav2", **{"metric.rule": "always_normalise"})
    assert score(model, lenient)["vqa_accuracy"]["value"] == close(4.6 / 6)
    assert score(model, lenient)["vqa_accuracy"]["rule"] == "always_normalise"


def test_vqa_answers_are_joined_by_id_and_must_be_there() -> None:
    files = options("vqav2")
    with pytest.raises(DataError, match="question '1000' has no answers; give the option annot"):
        VQA(files["samples.questions"], files["train.annotations"])
    with pytest.raises(DataError, match="'vqa/1000' names the image 'COCO_val.*no folder"):
        VQA(files["samples.questions"], files["samples.annotations"])[0]


def test_okvqa_stems_as_its_annotators_were_stemmed() -> None:
    ids = [f"okvqa/{i}" for i in (1000, 2001, 3002, 4003, 1004)]
    said = ["surfing", "Leaves.", "winters", "pony tails", "riding"]
    entries = score(Scripted(dict(zip(ids, said, strict=True))), build("okvqa"))
    assert entries["vqa_accuracy"]["value"] == pytest.approx(0.8)
    assert entries["vqa_accuracy"]["stemmer"] == "annotated-pairs-1"
    assert values(entries, "vqa_accuracy/four", "vqa_accuracy/nine") == close(0.5, 1)


def test_gqa() -> None:
    said = ["Yes.", "Red", "the green", "no", "tshirt", "yes"]
    ids = [f"gqa/{i}" for i in range(101, 107)]
    entries = score(Scripted(dict(zip(ids, said, strict=True))), build("gqa"))
    assert values(entries, "accuracy", "accuracy/binary", "accuracy/open") == close(
        4 / 6, 3 / 4, 0.5
    )
    assert (entries["accuracy"]["rule"], entries["accuracy"]["prior"]) == (
        "rstrip_lower",
        pytest.approx(5 / 6, abs=1e-6),
    )


def test_textvqa_and_its_ocr_prompt() -> None:
    said = ["STOP", "twelve", "redblue", "Anna's", "stop sign"]
    ids = [f"textvqa/{i}" for i in range(34602, 34607)]
    entries = score(Scripted(dict(zip(ids, said, strict=True))), build("textvqa"))
    assert entries["vqa_accuracy"]["value"] == pytest.approx(0.8)
    assert entries["vqa_accuracy"]["rule"] == "evalai"
    files = options("textvqa")
    ocr = FIXTURES / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json"
    hinted = TextVQA(files["samples.questions"], files["samples.images"], ocr)
    assert question_of(hinted[0]) == "what does the sign say?\nReference OCR token: STOP, ALL"


def test_docvqa() -> None:
    said = ["12 march 1999", "J Smith", "", "annual reports", "Seoul"]
    ids = [f"docvqa/{i}" for i in range(49150, 49155)]
    entries = score(Scripted(dict(zip(ids, said, strict=True))), build("docvqa"))
    assert entries["anls"]["value"] == pytest.approx((1 + 7 / 8 + 0 + 13 / 14 + 0) / 5, abs=1e-6)
    assert entries["anls"]["unparsed"] == 0.2 and entries["anls"]["rule"].startswith("rrc")
    assert entries["anls/table_list"]["n"] == 1
    assert entries["anls/handwritten"]["value"] == close((1 + 7 / 8) / 2)


def test_chartqa() -> None:
    said = ["14.6", "yes", "0.41", "0.4", "yellow.", "0.0"]
    ids = [f"chartqa/{'human' if i < 3 else 'augmented'}/{i}" for i in range(6)]
    entries = score(Scripted(dict(zip(ids, said, strict=True))), build("chartqa"))
    keys = ["relaxed_accuracy" + part for part in ("", "/human", "/augmented")]
    assert values(entries, *keys) == close(4 / 6, 1, 1 / 3)


# --- choices ------------------------------------------------------------------------------------


def test_scienceqa() -> None:
    said = ["A", "B. square", "The answer is A.", "I think tree", "B"]
    said.append("The answer is A. The answer is B.")
    model = Scripted({f"scienceqa/{i}": text for i, text in enumerate(said, 1)})
    benchmark = build("scienceqa")
    entries = score(model, benchmark)
    whole = entries["accuracy"]
    assert [whole[k] for k in ("value", "unparsed", "chance")] == close(0.5, 1 / 3, 2.75 / 6)
    assert (whole["prior"], whole["scorer"]) == (0.0, "generate")  # "yellow" is no option here
    assert whole["letters"] == {"A": 0.333333, "B": 0.333333, "None": 0.333333}
    tags = ("NAT", "SOC", "LAN", "IMG", "TXT", "NO", "G1-6", "G7-12")
    expected = (2 / 3, 0.5, 0, 2 / 3, 0.5, 0.5, 0.5, 0.5)
    assert values(entries, *(f"accuracy/{tag}" for tag in tags)) == close(*expected)
    assert [len(s.images) for s in benchmark.samples] == [1, 1, 0, 0, 0, 1]
    assert model.asked["scienceqa/2"].splitlines() == [
        "Context: Look close.",
        "Which shape is it?",
        "A. circle",
        "B. square",
        "Answer with the option's letter from the given choices directly.",
    ]


def test_letters_are_ranked_and_ties_choose_none() -> None:
    ranks = {f"scienceqa/{i}": [0, -1] for i in (1, 2, 3)}
    ranks |= {"scienceqa/4": [-9, 0, -1, -1], "scienceqa/5": [-1, -1], "scienceqa/6": [-2, -1]}
    entries = score(Scripted(ranks, "loglikelihood"), build("scienceqa"))
    assert entries["accuracy"]["scorer"] == "loglikelihood"
    # right: 1 (A), 3 (A), 4 (B), 6 (B); 2 is wrong and 5 a tie
    assert values(entries, "accuracy") == [close(4 / 6)]
    assert entries["accuracy"]["unparsed"] == close(1 / 6)


def test_mmbench_asks_every_rotation() -> None:
    benchmark = build("mmbench")
    samples = list(benchmark.samples)
    assert len(samples) == 4 + 2 + 2 + 3
    assert samples[1].candidates == ["yellow", "red", "green", "blue"]
    assert samples[1].id == "mmbench/0/1" and samples[1].target == "red"
    assert samples[4].images[0].key == samples[6].images[0].key, (
        "question 2 shares the picture of 1"
    )
    assert lettered(samples[0]).prompt[0]["content"][-1]["text"].startswith("Context: It has one")

    def say(sample: Sample) -> str:
        gold = next(k for k, text in letters_of(sample).items() if text == sample.target)
        return {"0": f"({gold})", "1": gold, "2": "B", "3": "A square"}[sample.group]

    entries = score(Scripted({s.id: say(s) for s in samples}), benchmark)
    assert list(entries)[0] == "circular_accuracy"
    assert values(entries, "circular_accuracy", "accuracy") == [0.75, 1.0]
    chance = (1 / 4**4 + 2 / 2**2 + 1 / 3**3) / 4
    assert entries["circular_accuracy"]["chance"] == close(chance)
    assert entries["circular_accuracy/shape"]["value"] == 0.5
    constant = score(Scripted({s.id: "A" for s in samples}), benchmark)
    assert constant["circular_accuracy"]["value"] == 0.0
    lost = score(Scripted({s.id: "I cannot tell." for s in samples}), benchmark)
    assert lost["circular_accuracy"]["unparsed"] == 1.0
    assert lost["accuracy"]["value"] == 0.0


def test_mmbench_takes_copies_that_the_file_holds(tmp_path: Path) -> None:
    rows = [
        "index\tquestion\tA\tB\tanswer\timage",
        "7\twhich?\tx\ty\tA\t7.png",
        "1000007\twhich?\ty\tx\tB\t7.png",
    ]
    (tmp_path / "own.tsv").write_text("\n".join(rows))
    draw(tmp_path / "7.png")
    more = {"samples.path": str(tmp_path / "own.tsv"), "samples.images": str(tmp_path)}
    samples = list(build("mmbench", **more).samples)
    assert [(s.group, s.meta["rotation"], s.target) for s in samples] == [
        ("7", 0, "x"),
        ("7", 1, "x"),
    ]


def test_pope_scores_three_splits_and_says_what_it_had_to_guess() -> None:
    said = {
        "random": ["Yes, there is.", "No.", "yes", "NO"],
        "popular": ["I cannot say", "No", "", "There is not."],
        "adversarial": ["yes"] * 4,
    }
    answers = {f"pope/{s}/{i}": t for s, texts in said.items() for i, t in enumerate(texts, 1)}
    entries = score(Scripted(answers), build("pope"))
    assert list(entries)[0] == "f1"
    splits = [f"f1/{name}" for name in said]
    assert values(entries, "f1", *splits) == close((0.8 + 1 + 2 / 3) / 3, 0.8, 1, 2 / 3)
    strict = [f"f1_strict/{name}" for name in said]
    assert values(entries, "f1_strict", *strict) == close((1 + 0 + 2 / 3) / 3, 1, 0, 2 / 3)
    assert values(entries, "accuracy", "accuracy/random", "yes_ratio") == close(0.75, 0.75, 0.75)
    assert entries["f1"]["unparsed"] == 0.25 and entries["f1/popular"]["unparsed"] == 0.75
    assert entries["f1"]["always_yes"] == close(2 / 3) and entries["f1"]["chance"] == 0.5
    assert entries["f1"]["low"] is not None and "auroc" not in entries


def test_pope_by_likelihood_adds_auroc() -> None:
    names = ("random", "popular", "adversarial")
    ranks = {f"pope/{s}/{i}": [0, -1] if i % 2 else [-1, -0.5] for s in names for i in range(1, 5)}
    entries = score(Scripted(ranks, "loglikelihood"), build("pope", **{"scorers": RANK}))
    assert values(entries, "f1", "accuracy", "auroc") == [1.0, 1.0, 1.0]


RANK = [{"_target_": "triptych.evaluation.wording.Rank"}]


# --- captions and pairs -------------------------------------------------------------------------


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "meteor_available", lambda: False)


def test_captions_of_karpathys_split(no_java: None) -> None:
    benchmark = build("coco_captions", tokenizer="nltk")
    samples = list(benchmark.samples)
    assert len(samples) == 6 and samples[0].meta["references"][2] == "one red box on a white page"
    said = {s.id: s.target for s in samples}
    said[samples[0].id] = "a dog on a red square"
    said[samples[1].id] = "A kite\nand a dog."
    model = Scripted(said)
    entries = score(model, benchmark)
    gold = {s.id: s.meta["references"] for s in samples}
    expected = cider_d(*(ptb_tokenize(texts, "nltk") for texts in (said, gold)))[0]
    assert expected > 1 and list(entries)[0] == "cider_d"
    assert entries["cider_d"]["value"] == close(expected)
    assert 0 < entries["bleu_4"]["value"] < entries["bleu_1"]["value"] < 1
    # mentioned: dog (annotated), kite (annotated), dog (not there)
    assert values(entries, "chair_i", "chair_s") == close(1 / 3, 1 / 6)
    assert entries["chair_i"]["better"] == "lower"
    assert 0 <= entries["cider_d"]["prior"] < entries["cider_d"]["value"]
    assert list(benchmark.left_out) == ["spice", "meteor"] and "meteor" not in entries
    assert set(model.asked.values()) == {"Provide a one-sentence caption of the image."}


def test_blind_captions_are_those_of_all_images(no_java: None) -> None:
    benchmark = build("flickr30k_captions", tokenizer="nltk")
    model = Scripted({s.id: "a red square" for s in benchmark.samples})
    entry = evaluate(model, {"b": benchmark}, None, progress=False)["metrics"]["b/cider_d"]
    assert entry["blind_n"] == entry["n"] == 6 and entry["blind"] == entry["value"]
    assert entry["uses_images"] is None, "without a training file there is no prior to exceed"


def test_retrieval_reads_karpathys_split() -> None:
    for name in ("coco_retrieval", "flickr30k_retrieval"):
        samples = list(build(name).samples)
        assert len(samples) == 14 and len({s.images[0].key for s in samples}) == 6


def test_winoground_needs_strict_wins() -> None:
    scores = [
        ([2, 1], [1, 2]),  # all
        ([2, 1], [3, 4]),  # text: the second image likes everything more
        ([1, 1], [0, 2]),  # image: a tie is no win of a text
        ([0, 0], [0, 0]),
        ([1, 2], [2, 1]),
    ]
    ranks = {f"winoground/{i}/{k}": row[k] for i, row in enumerate(scores) for k in (0, 1)}
    benchmark = build("winoground")
    assert [benchmark.samples[i].target for i in (0, 1)] == benchmark.samples[0].candidates
    entries = score(Scripted(ranks, "loglikelihood"), benchmark)
    assert list(entries)[0] == "group"
    assert values(entries, "text", "image", "group", "text/object") == close(0.4, 0.4, 0.2, 1 / 3)
    assert [entries[k]["chance"] for k in ("text", "image", "group")] == close(0.25, 0.25, 1 / 6)
    assert entries["group"]["n"] == 5 and entries["text"]["rule"] == "strict"
    letters = {key: "A" if key.endswith("0") else "B" for key in ranks}
    written = score(Scripted(letters), benchmark)
    assert written["text"]["value"] == 1.0 and "group" not in written


def test_sugarcrepe() -> None:
    benchmark = build("sugarcrepe")
    golds = [s.candidates.index(s.target) for s in benchmark.samples]
    assert golds == [0, 1, 0, 1, 0, 1], "the true caption has no favourite place"
    right = [True, True, None, True, False, False]
    ranks = {
        s.id: [0, 0] if ok is None else [int((place == 0) == ok), int((place == 1) == ok)]
        for s, place, ok in zip(benchmark.samples, golds, right, strict=True)
    }
    entries = score(Scripted(ranks, "loglikelihood"), benchmark)
    keys = ("accuracy", "accuracy/add_obj", "accuracy/replace_att", "accuracy/swap_att")
    assert values(entries, *keys, "macro_accuracy") == close(0.5, 1, 0.5, 0, 0.5)
    assert entries["accuracy"]["unparsed"] == close(1 / 6)


# --- folders and own files ----------------------------------------------------------------------


def test_imagenet_folders_are_called_by_their_synsets() -> None:
    samples = build("zero_shot_folder").samples
    names = ["tench", "crane, wading bird", "crane, lifting machine", "orange"]
    assert samples[0].candidates == names and len(samples) == 8
    assert {s.target for s in samples if "n07747607" in s.id} == {"orange"}


def test_reading_sums_edits_over_the_corpus() -> None:
    said = ["bakery", "platform 9", " ", unicodedata.normalize("NFD", "서울"), "exits"]
    answers = {f"ocr/word_{i}.png": text for i, text in enumerate(said)}
    entries = score(Scripted(answers), build("ocr_folder"))
    assert list(entries)[:3] == ["cer", "wer", "accuracy"]
    assert values(entries, "cer", "wer", "accuracy") == close(10 / 30, 4 / 7, 2 / 5)
    assert entries["cer"]["unparsed"] == 0.2 and entries["cer"]["better"] == "lower"


def test_transcripts_beside_the_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("two  words\n")
    assert [s.target for s in Transcripts(tmp_path)] == ["two words"]
    (tmp_path / "labels.csv").write_text("file,text\nb.png,three\na.png,four\n")
    assert [s.target for s in Transcripts(tmp_path)] == ["three", "four"]
    (tmp_path / "gt.txt").write_text("b.png\tfive\n")
    with pytest.raises(DataError, match=r"both gt\.txt and labels\.csv"):
        Transcripts(tmp_path)
    (tmp_path / "gt.txt").write_text("b.png\t\n")
    with pytest.raises(DataError, match="'b.png' has an empty transcript"):
        Transcripts(tmp_path, tmp_path / "gt.txt")


def test_drawn_words_are_a_function_of_seed_and_index() -> None:
    first, again, train = Words(size=8), Words(size=20), Words("train", size=8)
    for i in range(8):
        assert first[i].target == again[i].target
        assert first[i].images[0].open().tobytes() == again[i].images[0].open().tobytes()
    assert [s.target for s in first] != [s.target for s in train]
    assert {s.meta["level"] for s in first} == {"plain", "colour", "turned", "noisy"}
    assert len(set(first[0].images[0].open().getdata())) > 1


def test_a_perfect_reader_uses_its_images() -> None:
    benchmark = build("ocr")
    by_key = {s.images[0].key: s.target for s in benchmark.samples}

    class Reader(Scripted):
        def generate(self, samples: Sequence[Sample], **decoding: object) -> list[str]:
            return [by_key[s.images[0].key] for s in samples]

    entry = evaluate(Reader({}), {"ocr": benchmark}, None, progress=False)["metrics"]
    assert entry["ocr/cer"]["value"] == 0.0 < entry["ocr/cer"]["blind"]
    assert entry["ocr/accuracy"]["value"] == 1.0


def test_own_jsonl() -> None:
    said = {"0:a": "Red.", "1:b": "blue", "2:c": "yes", "3:d": "maybe", "4:e": "노랑"}
    model = Scripted({f"questions/{key}": text for key, text in said.items()})
    entries = score(model, build("jsonl", slice_by="part"))
    keys = ("accuracy", "accuracy/color", "accuracy/yes_no")
    assert values(entries, *keys) == close(3 / 5, 2 / 3, 1 / 2)
    assert entries["accuracy"]["unparsed"] == 0.2
    own = build("jsonl", train=options("jsonl")["path"])
    assert score(model, own)["accuracy"]["prior"] == close(3 / 5)  # ties go to the first


# --- files --------------------------------------------------------------------------------------

PATHS = [(name, key) for name, files in FILES.items() for key in files if key != "samples.split"]


@pytest.mark.parametrize(("name", "key"), PATHS)
def test_a_missing_file_is_said_with_its_option(name: str, key: str) -> None:
    with pytest.raises(DataError) as caught:
        build(name, **{key: "/nowhere/at all"})
    words, option = str(caught.value), key.rpartition(".")[2]
    assert "/nowhere/at all" in words and option in words and "\n" not in words
    assert words.count(". ") == 0, "one sentence"


def test_the_command_line_builds_several_and_names_the_one_that_fails() -> None:
    from triptych.bundle import compose_preset
    from triptych.run import build_benchmarks

    given = ["benchmark=[gqa,mmbench]"] + [
        f"benchmark.{name}.{key}='{value}'"
        for name in ("gqa", "mmbench")
        for key, value in options(name).items()
    ]
    built, left_out = build_benchmarks(compose_preset("llava", given).benchmark)
    assert not left_out
    assert [len(b.samples) for b in built.values()] == [6, 11] and list(built) == ["gqa", "mmbench"]
    wrong = compose_preset("llava", [*given, "benchmark.mmbench.samples.path=nowhere.tsv"])
    said = "benchmark.mmbench: option path: file 'nowhere.tsv'"
    built, left_out = build_benchmarks(wrong.benchmark)
    assert list(built) == ["gqa"] and left_out["mmbench"].startswith(said)
    with pytest.raises(TriptychError, match=f"^{re.escape(said)}"):
        build_benchmarks(OmegaConf.create({"mmbench": wrong.benchmark.mmbench}))


def test_tables_of_the_library_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = tmp_path / "p.png"
    draw(picture)
    features = datasets.Features(
        {key: datasets.Value("string") for key in ("question_id", "question", "answer", "category")}
        | {"image": datasets.Image()}
    )
    rows = {
        "question_id": ["1", "2"],
        "question": ["Is it red?", "Is it blue?"],
        "answer": ["yes", "no"],
        "category": ["random", "popular"],
        "image": [{"bytes": picture.read_bytes(), "path": None}] * 2,
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "shards").mkdir()
    table.to_parquet(tmp_path / "shards" / "test-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "shards", tmp_path / "shards/test-00000-of-00001.parquet"):
        samples = list(POPE(path))
        assert [s.id for s in samples] == ["pope/random/1", "pope/popular/2"]
        assert samples[0].images[0].key == samples[1].images[0].key
        assert samples[0].images[0].open().size == (8, 8)
    assert [s.target for s in DocVQA(tmp_path / "saved")] == ["yes", "no"]


def draw(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(path)

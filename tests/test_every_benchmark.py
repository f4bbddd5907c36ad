"""What holds for every benchmark there is: a constant model scores what a constant can."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fixture_benchmarks import FILES, SMALL, build

from triptych.cli import conf_dir
from triptych.evaluation import captioning
from triptych.evaluation.choice import ChoiceBenchmark
from triptych.evaluation.predictor import Score
from triptych.evaluation.runner import evaluate
from triptych.evaluation.scorers import Outcome
from triptych.evaluation.wording import letters_of
from triptych.types import Sample, TriptychError

# the card's parts, the subset of easy_vqa and the numbers of shots are tested where they are built
ELSEWHERE = {"none", "card", "easy_vqa_1000", "few_shots"}
NAMES = sorted({path.stem for path in (conf_dir() / "benchmark").glob("*.yaml")} - ELSEWHERE)
CAPTIONS = ("coco_captions", "flickr30k_captions")
WAYS = ("generate", "loglikelihood", "embed", "features")


class Constant:
    """Says one word, finds all answers equally likely, and embeds everything as one point."""

    def __init__(self, word: str, *ways: str) -> None:
        self.word, self.capabilities = word, frozenset(ways)
        self.batch_size, self.vision_calls, self.generated_tokens = 64, 0, 0

    def generate(self, samples: Sequence[Sample], **decoding: object) -> list[str]:
        return [self.word] * len(samples)

    def loglikelihood(
        self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        return [[Score(-1.0, 1, 1) for _ in names] for names in candidates]

    def embed_images(self, refs: Sequence[Any]) -> torch.Tensor:
        return torch.ones(len(refs), 1, 4) / 2

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(texts), 4) / 2

    def features(self, refs: Sequence[Any]) -> torch.Tensor:
        return torch.ones(len(refs), 4)


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "meteor_available", lambda: False)


def made(name: str) -> Any:
    return build(name, **({"tokenizer": "nltk"} if name in CAPTIONS else {}))


def score(benchmark: Any, word: str, *ways: str) -> dict[str, dict]:
    entries = evaluate(Constant(word, *ways), {"b": benchmark}, None, progress=False)["metrics"]
    return {key.removeprefix("b/"): entry for key, entry in entries.items()}


def test_every_benchmark_has_a_fixture_here() -> None:
    assert set(NAMES) == set(FILES) | set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_model_scores_what_a_constant_can(name: str) -> None:
    benchmark = made(name)
    samples = [benchmark.samples[i] for i in range(len(benchmark.samples))]
    golds = Counter(_answer(benchmark, sample) for sample in samples)
    usual = golds.most_common(1)[0][0]
    tried = 0
    for way in WAYS:
        if not any(scorer.needs == way for scorer in benchmark.scorers):
            continue
        try:
            entries = score(benchmark, usual, way)
        except TriptychError as error:  # open answers and several images cannot be ranked so
            refused = ("no closed list", "takes exactly one")
            assert any(words in str(error) for words in refused) and way != "generate"
            continue
        tried += 1
        for key, entry in entries.items():
            assert entry["uses_images"] is not True, (way, key)
            if entry["blind"] is not None:
                assert entry["blind"] == pytest.approx(entry["value"], abs=1e-6), (way, key)
            most = [entry.get(k) for k in ("chance", "majority", "always_yes")]
            known = [value for value in most if value is not None]
            if known and key not in ("yes_ratio", "recall"):
                assert entry["value"] <= max(known) + 1e-6, (way, key)
        if way in ("loglikelihood", "embed"):  # all alike: no candidate wins
            assert all(e["value"] <= (e.get("chance") or 1) + 1e-6 for e in entries.values())
    assert tried, "some way of asking must work"


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("linear_probe",)])
def test_what_cannot_be_read_is_counted_and_never_guessed(name: str) -> None:
    benchmark = made(name)
    if not any(scorer.needs == "generate" for scorer in benchmark.scorers):
        pytest.skip("nothing is written here")
    sample = benchmark.samples[0]
    record = benchmark.record(sample, Outcome("  \n"))
    assert record["parsed"] is None and record["correct"] == 0.0
    entries = score(benchmark, "", "generate")
    first = next(iter(entries.values()))
    assert first["unparsed"] == 1.0
    if sample.candidates:  # a closed list: words outside it are no answer
        lost = benchmark.record(sample, Outcome("Purple elephants, perhaps?"))
        assert lost["parsed"] is None and lost["correct"] == 0.0


def _answer(benchmark: Any, sample: Sample) -> str:
    """What a model would write to be right."""
    if isinstance(benchmark, ChoiceBenchmark):
        return next(k for k, text in letters_of(sample).items() if text == sample.target)
    return sample.text if sample.target is None else str(sample.target)


def test_several_benchmarks_share_one_table(tmp_path: Path) -> None:
    names = ["vqav2", "scienceqa", "mmbench", "pope", "coco_captions", "winoground", "ocr_folder"]
    built = {name: made(name) for name in names}
    model = Constant("yes", "generate")
    evaluate(model, built, tmp_path, progress=False)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    counts = Counter(row["benchmark"] for row in rows)
    assert counts == {name: len(benchmark.samples) for name, benchmark in built.items()}
    assert all(row["gold"] and row["raw_output"] == "yes" for row in rows)
    keys = list(json.loads((tmp_path / "results.json").read_text())["metrics"])
    heads = ("vqav2/vqa_accuracy", "scienceqa/accuracy", "mmbench/circular_accuracy", "pope/f1")
    more = ("coco_captions/cider_d", "winoground/text", "ocr_folder/cer")
    assert {*heads, *more} <= set(keys)

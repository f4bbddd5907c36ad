"""Comparison: verdicts with intervals, recipes and seeds, sweeps, pages, and W&B projects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.compare import compare, main
from triptych.evaluation.compare_page import parallel_coordinates, varying, write_page
from triptych.evaluation.compare_runs import EvaluatedRun, evaluate_sources, load_runs
from triptych.evaluation.compare_tables import score_rows, text_table
from triptych.evaluation.metrics import holm, paired_compare
from triptych.evaluation.records import write_json
from triptych.evaluation.runner import evaluate
from triptych.types import ImageRef, Sample, TriptychError, assistant, user

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
IMAGES, EACH = 120, 3


class Questions(list):
    """Three questions about each of many pictures in one of three colours."""

    def __init__(self, count: int = IMAGES) -> None:
        made = []
        for i in range(count):
            name = list(COLORS)[i % 3]
            picture = Image.new("RGB", (8, 8), COLORS[name])
            picture.putpixel((0, 0), (i % 256, i // 256, 7))
            ref = ImageRef.from_picture(picture, f"{i}.png")
            for k in range(EACH):
                turns = [user(f"color {k}?", 1), assistant(name)]
                meta = {"type": f"kind{k}"}
                sample = Sample(turns, [ref], name, list(COLORS), id=f"{i}-{k}", meta=meta)
                sample.cluster = f"{i}"
                made.append(sample)
        super().__init__(made)


class Eyes:
    """Sees the colour, but of a share of the pictures (drawn by its seed) a wrong one."""

    capabilities, batch_size, generated_tokens = frozenset({"generate"}), 16, 0

    def __init__(self, wrong: float, seed: int) -> None:
        self.wrong, self.seed, self.vision_calls = wrong, seed, 0

    def identity(self) -> list:
        return [self.wrong, self.seed]

    def generate(self, samples: Sequence[Sample], **decoding: Any) -> list[str]:
        return [self.say(sample) for sample in samples]

    def say(self, sample: Sample) -> str:
        pixel = sample.images[0].open().getpixel((5, 5))
        color = next(name for name, value in COLORS.items() if value == pixel)
        rng = np.random.default_rng([self.seed, int(sample.cluster)])
        return color if rng.random() >= self.wrong else "purple"


def run_of(
    folder: Path, wrong: float, seed: int, config: dict | None = None, **settings: Any
) -> Path:
    bench = {"toy": AnswerBenchmark(Questions(), slice_by="type")}
    evaluate(Eyes(wrong, seed), bench, folder, progress=False, **{"blind": "none", **settings})
    here = {"_target_": "triptych.evaluation.benchmark.AnswerBenchmark", "slice_by": "type"}
    here["samples"] = {"_target_": f"{__name__}.Questions"}
    asked = {"benchmark": {"toy": here}, "eval": settings}
    OmegaConf.save(OmegaConf.create(asked), folder / "evaluation.yaml")
    if config is not None:
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def recipe(seed: int, **more: Any) -> dict:
    return {"seed": seed, "optim": {"lr": 0.001, **more}, "logger": {"name": f"run {seed}"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "seed0": run_of(root / "seed0", 0.10, 0, recipe(0)),
        "seed1": run_of(root / "seed1", 0.10, 1, recipe(1)),
        "weak": run_of(root / "weak", 0.30, 2, recipe(0, lr=0.1)),
        "shuffled": run_of(root / "seed0" / "eval" / "abc", 0.10, 0, images="permuted"),
    }


def read(runs: dict[str, Path], *names: str) -> list[EvaluatedRun]:
    return load_runs([str(runs[name]) for name in names], Path("/nowhere"))


def only(found: list, metric: str = "toy/accuracy") -> Any:
    return next(d for d in found if d.metric == metric)


# --- verdicts -----------------------------------------------------------------------------------


def test_seeds_make_no_difference_and_shuffled_images_do(runs):
    row = only(compare(read(runs, "seed0", "seed1")))
    assert row.verdict == "no difference" and row.p > 0.05 and row.low < 0 < row.high
    assert row.n == IMAGES * EACH and row.images == IMAGES
    assert "seed" in row.note
    worse = only(compare(read(runs, "seed0", "shuffled")))
    assert worse.verdict == "worse" and worse.p_holm < 0.001
    assert worse.difference < -0.3 and worse.low < worse.difference < worse.high < 0
    assert worse.b.endswith("eval/abc") and not worse.note.startswith("one recipe")


def test_the_numbers_are_those_of_the_paired_test(runs):
    a, b = read(runs, "seed0", "weak")
    left, right = a.samples("toy/accuracy"), b.samples("toy/accuracy")
    x, y = ([rows[k]["correct"] for k in left] for rows in (left, right))
    expected = paired_compare(y, x, [left[k]["cluster_id"] for k in left])
    row = only(compare([a, b]))
    assert row.verdict == "worse"
    assert (row.difference, row.low, row.high, row.p) == expected[:4]
    assert len(row.wins) - len(row.losses) == round(sum(y) - sum(x))
    back = only(compare([b, a]))
    assert back.verdict == "better" and back.wins == row.losses
    plain = paired_compare(y, x)
    assert row.high - row.low > 1.4 * (plain.high - plain.low), "three answers of an image are one"


def test_p_values_are_corrected_for_the_number_of_runs(runs):
    found = compare(read(runs, "seed0", "seed1", "weak", "shuffled"), every_pair=True)
    heads = [d for d in found if d.metric == "toy/accuracy"]
    assert len(heads) == 6 and len(found) == 4 * 6
    assert [d.p_holm for d in heads] == holm([d.p for d in heads])
    slices = [d for d in found if d.metric != "toy/accuracy"]
    assert [d.p_holm for d in slices] == holm([d.p for d in slices])
    assert {d.n for d in slices} == {IMAGES}


def test_a_difference_within_the_noise_of_seeds_is_none(tmp_path):
    """Seeds 8 points apart: another recipe 5 points below the first is not called worse."""
    made = {
        "a": run_of(tmp_path / "a", 0.05, 0, recipe(0)),
        "b": run_of(tmp_path / "b", 0.30, 0, recipe(1)),
        "c": run_of(tmp_path / "c", 0.20, 0, recipe(0, lr=0.5)),
    }
    alone = only(compare(read(made, "a", "c")))
    assert alone.verdict == "worse"
    found = [d for d in compare(read(made, "a", "b", "c")) if d.metric == "toy/accuracy"]
    assert [d.verdict for d in found] == ["no difference"] * 2
    assert found[0].p < 0.001 and "one recipe, other seed" in found[0].note
    assert "no larger than what a seed makes here" in found[1].note


def test_lower_is_better_where_errors_are_counted():
    rows = {f"{i}": {"sample_id": f"{i}", "cluster_id": f"{i}", "gold": "x"} for i in range(40)}

    def of(name: str, value: float) -> EvaluatedRun:
        mine = {k: {**row, "cer": value + int(k) % 2 / 100} for k, row in rows.items()}
        entry = {"value": value + 0.005, "scorer": "generate"}
        return EvaluatedRun(name, {"ocr/cer": entry}, {("ocr", "generate"): mine})

    assert only(compare([of("a", 0.1), of("b", 0.3)]), "ocr/cer").verdict == "worse"
    assert only(compare([of("b", 0.3), of("a", 0.1)]), "ocr/cer").verdict == "better"


def test_corpus_metrics_are_not_tested_and_missing_samples_are_said(runs):
    a, b = read(runs, "seed0", "weak")
    a.metrics["toy/bleu"] = {"value": 0.5, "scorer": "generate"}
    b.metrics["toy/bleu"] = {"value": 0.75, "scorer": "generate"}
    rows = b.rows["toy", "generate"]
    for name in list(rows)[:30]:
        del rows[name]
    b.metrics["toy/accuracy"]["value"] = sum(r["correct"] for r in rows.values()) / len(rows)
    found = compare([a, b])
    bleu = only(found, "toy/bleu")
    assert (bleu.verdict, bleu.p, bleu.difference) == ("not tested", None, 0.25)
    assert only(found).n == IMAGES * EACH - 30
    assert "30 samples are in one run only" in only(found).note
    next(iter(rows.values()))["gold"] = "else"
    with pytest.raises(TriptychError, match="has gold .*rescore both"):
        compare([a, b])
    with pytest.raises(TriptychError, match="two runs or more"):
        compare([a])


# --- sources ------------------------------------------------------------------------------------


def test_a_sweep_is_its_runs_and_settings_that_differ_are_axes(runs, tmp_path):
    for name, lr, depth in (("x", 1e-4, 2), ("y", 1e-3, 2), ("z", 1e-1, 3)):
        shutil.copytree(runs["weak"], tmp_path / "sweep" / name)
        config = {"seed": 0, "optim": {"lr": lr}, "model": {"depth": depth, "same": True}}
        OmegaConf.save(OmegaConf.create(config), tmp_path / "sweep" / name / "config.yaml")
    swept = load_runs([str(tmp_path / "sweep")], tmp_path)
    assert [run.name for run in swept] == ["x", "y", "z"]
    assert varying(swept) == ["optim.lr", "model.depth"]
    plot = parallel_coordinates(swept)
    assert plot.count("<polyline") == 3 and ">0.0001<" in plot and ">toy/accuracy<" in plot
    heights = [p.split(",")[1].split(" ")[0] for p in plot.split('points="')[1:]]
    assert heights[0] == "430.0" and heights[2] == "110.0", "a magnitude is a step"
    assert float(heights[1]) == pytest.approx(430 - 320 / 3, abs=0.1)
    assert parallel_coordinates(swept[:1]) == ""
    with pytest.raises(TriptychError, match="holds no results.json"):
        load_runs([str(tmp_path / "nothing")], tmp_path)


def test_a_later_evaluation_of_a_run_belongs_to_it(runs):
    (run,) = read(runs, "seed0")
    assert set(run.rows) == {("toy", "generate")}
    values = [row["correct"] for row in run.samples("toy/accuracy").values()]
    assert np.mean(values) > 0.8, "its own answers, not those with shuffled images below it"


def test_runs_of_a_wandb_project(runs, tmp_path, monkeypatch):
    import wandb

    class Artifact:
        type = "evaluation"

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def download(self, root: str) -> None:
            names = ("results.json", "samples.parquet", "evaluation.yaml")
            Path(root).mkdir(parents=True)
            for name in names:
                shutil.copy(self.folder / name, root)

    class Run:
        def __init__(self, name: str, held: list) -> None:
            self.name, self.id, self.held = name, f"id-{name}", held
            self.config = {"seed": 0, "optim": {"lr": len(name)}}

        def logged_artifacts(self) -> list:
            return self.held

    class Api:
        def runs(self, path: str) -> list:
            assert path == "us/project"
            return [Run("seed0", [Artifact(runs["seed0"])]), Run("empty", [])]

        def run(self, path: str) -> Run:
            if path != "us/project/7":
                raise ValueError("Could not find run")
            return Run("weak", [Artifact(runs["weak"])])

    monkeypatch.setattr(wandb, "Api", Api)
    found = load_runs(["wandb:us/project", "wandb:us/project/7"], tmp_path)
    assert [run.name for run in found] == ["seed0-id-seed0", "weak-id-weak"]
    assert only(compare(found)).verdict == "worse" and varying(found) == ["optim.lr"]
    with pytest.raises(TriptychError, match="cannot be read from W&B .*local folders"):
        load_runs(["wandb:us/project/8"], tmp_path)


# --- what is shown ------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_one_page(runs, tmp_path, capsys):
    arguments = [str(runs["seed0"]), str(runs["seed1"]), str(runs["shuffled"])]
    main([*arguments, "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    line = next(t for t in told.splitlines() if "eval/abc" in t and "worse" in t)
    assert "[-" in line and "<0.001" in line
    assert "no difference" in told and "chance" in told.splitlines()[0]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/png;base64,") >= 12, "wins and losses with pictures"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    assert "<dt>question</dt><dd>color" in page and "purple" in page
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())["differences"]
    assert {d["verdict"] for d in stored if d["metric"] == "toy/accuracy"} == {
        "no difference",
        "worse",
    }
    with pytest.raises(SystemExit, match="error: '.*' holds no results.json"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path)])


def test_one_run_is_a_table_and_text_is_escaped(runs, tmp_path):
    (run,) = read(runs, "weak")
    run.name = "<b>mine</b>"
    lines = text_table(score_rows([run])).splitlines()
    assert lines[0].split()[:4] == ["metric", "run", "scorer", "n"] and len(lines) == 3
    write_page(tmp_path / "page.html", [run], [])
    assert "&lt;b&gt;mine" in (tmp_path / "page.html").read_text()
    assert "<b>" not in (tmp_path / "page.html").read_text()


def test_pages_without_data_say_why(runs, tmp_path):
    a, b = read(runs, "seed0", "weak")
    a.nodes = b.nodes = None
    write_page(tmp_path / "page.html", [a, b], compare([a, b]))
    assert "do not say where its data is" in (tmp_path / "page.html").read_text()


def test_tables_are_sent_where_asked(runs, tmp_path, monkeypatch):
    sent: dict[str, Any] = {}

    class Sink:
        def __init__(self, folder: Path, config: dict, project: str, job_type: str) -> None:
            sent["project"] = project

        def log_samples(self, rows: list, name: str) -> None:
            sent[name] = rows

        def finish(self) -> None:
            sent["finished"] = True

    import triptych.wandb_sink

    monkeypatch.setattr(triptych.wandb_sink, "WandbSink", Sink)
    main([str(runs["seed0"]), str(runs["weak"]), "--out", str(tmp_path), "--wandb", "mine"])
    assert sent["project"] == "mine" and sent["finished"]
    assert sent["differences"][0]["verdict"] == "worse" and len(sent["scores"]) == 2


def test_runs_and_presets_are_evaluated_each_with_its_own_options(tmp_path, monkeypatch):
    asked = []

    def start(command, **_):
        asked.append(command[3:-1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("triptych.evaluation.compare_runs.subprocess.run", start)
    sources = [str(tmp_path), "clip/b32", "gpt4v:eyes-1 model.budget=null"]
    folders = evaluate_sources(sources, "easy_vqa,shapes", ["eval.limit=5"], tmp_path)
    names = [Path(folder).name for folder in folders]
    assert [names[0][:-7], names[1], names[2][:-7]] == [tmp_path.name, "clip-b32", "gpt4v-eyes-1"]
    common = ["benchmark=[easy_vqa,shapes]", "eval.limit=5"]
    assert asked == [
        [f"run='{tmp_path}'", *common],
        ["model=clip/b32", *common],
        ["model=gpt4v", "model.id='eyes-1'", *common, "model.budget=null"],
    ]


def test_left_out_benchmarks_are_said(runs, tmp_path, capsys):
    folder = tmp_path / "some"
    shutil.copytree(runs["seed0"], folder, ignore=shutil.ignore_patterns("eval"))
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", {**results, "left_out": {"docvqa": "no file"}})
    main([str(folder), str(runs["weak"]), "--out", str(tmp_path / "out")])
    assert "docvqa was left out, no file" in capsys.readouterr().out

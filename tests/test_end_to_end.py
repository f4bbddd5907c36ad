"""The two commands as a user types them, on a few dialogues of a user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT, script: str = "train.py") -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def mine(tiny, pictures, tmp_path_factory) -> list[str]:
    """Overrides that put the tiny parts and eight dialogues of a user's own in place."""
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for i, ref in enumerate(pictures):
        ref.open().save(folder / f"{i}.png")
        for color in ("red", "blue"):
            text = f"User: is it {color}?\nAssistant: {'yes' if i % 2 else 'no'}"
            rows.append({"image": f"{i}.png", "text": text})
    path = folder / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [
        "data=instructions",
        f"data.path={path}",
        f"data.images={folder}",
        "data.workers=0",
        "data.batch_size=2",
        f"model.vision.weights={tiny / 'vision'}",
        f"model.language.weights={tiny / 'language'}",
        "trainer.max_steps=3",
        "trainer.max_epochs=5",
        "benchmark.easy_vqa.train=null",
        "eval.limit=20",
        "eval.blind=none",
    ]


def test_train_then_evaluate_with_nothing_retyped(mine, tmp_path):
    directory = tmp_path / "run"
    arguments = ["model=llava", "peft=qlora", *mine, f"hydra.run.dir={directory}"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Run directory: {directory}" in done.stdout
    assert "connector" in done.stdout and "nf4" in done.stdout  # the table of parts
    left = {p.name for p in directory.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "bundle", "results.json", "timing.json"}
    assert expected | {"samples.parquet", "gallery.html", "gallery.png"} <= left
    trained = json.loads((directory / "results.json").read_text())["metrics"]
    assert trained["easy_vqa/accuracy"]["scorer"] == "generate"

    again = run(f"run={directory}", "eval.limit=20", "eval.blind=none", script="evaluate.py")
    assert again.returncode == 0, again.stderr[-3000:]
    folder = next((directory / "eval").iterdir())
    scored = json.loads((folder / "results.json").read_text())["metrics"]
    assert scored["easy_vqa/accuracy"]["value"] == trained["easy_vqa/accuracy"]["value"]

    refused = run(*arguments)
    assert refused.returncode == 2 and str(directory) in refused.stderr
    assert "ckpt=last" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "wrong,words",
    [
        ("modle=llava", "model"),
        ("model=lava", "llava"),
        ("optim.lrr=1", "optim.lr"),
        ("+peft.lora.rr=8", "peft.lora.r"),
        ("data=instructions", "data.path"),
    ],
)
def test_a_mistake_costs_one_sentence(wrong, words):
    done = run(wrong)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_preset_composes_and_loads_from_any_directory(tmp_path):
    code = "from triptych.bundle import compose_preset as c; print(c('llava/7b').model.name)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "llava-7b", done.stderr[-2000:]


@pytest.mark.slow
def test_a_wheel_carries_configuration_and_assets(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in (
        "_conf/train.yaml",
        "_conf/model/llava/7b.yaml",
        "_assets/tiny/language/config.json",
    ):
        assert f"triptych/{name}" in names
    assert "hydra_plugins/triptych_launcher.py" in names

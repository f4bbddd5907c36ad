"""The commands a user types: killed, resumed, on two ranks, rescored, with one byte changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASKED = ["eval.limit=60", "eval.batch_size=4", "eval.blind=all"]
FILES = ("results.json", "samples.parquet", "predictions/easy_vqa.jsonl")


def start(*arguments: str, ranks: int = 0, script: str = "evaluate.py") -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks else []), str(ROOT / script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    told, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    return told


def results(run: Path) -> Path:
    """The folder of the run's only evaluation."""
    return next(p for p in (run / "eval").iterdir() if (p / "evaluation.yaml").exists())


def same(one: Path, two: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture(scope="module")
def run(tiny, pictures, tmp_path_factory) -> Path:
    """A run of three steps on a user's own dialogues."""
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for i, ref in enumerate(pictures):
        ref.open().save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "User: is it red?\nAssistant: yes"})
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    finish(
        start(
            *("model=llava", "peft=lora", "data=instructions", f"data.path={folder}/mine.jsonl"),
            *(f"data.images={folder}", "data.workers=0", "data.batch_size=2"),
            *("trainer.max_steps=3", "eval.limit=8", "eval.blind=none"),
            *(f"model.vision.weights={tiny / 'vision'}", "benchmark.easy_vqa.train=null"),
            *(f"model.language.weights={tiny / 'language'}", f"hydra.run.dir={folder / 'run'}"),
            script="train.py",
        )
    )
    return folder / "run"


def copy(run: Path, name: str) -> Path:
    made = run.with_name(name)
    shutil.copytree(run, made, ignore=shutil.ignore_patterns("eval", "results.json"))
    return made


@pytest.mark.slow
def test_an_evaluation_that_can_be_trusted(run):
    whole, killed, two, other = (copy(run, n) for n in ("whole", "killed", "two", "other"))
    finish(start(f"run={whole}", *ASKED))

    process = start(f"run={killed}", *ASKED)
    part = "eval/*/predictions/easy_vqa*.rank0.jsonl"
    for _ in range(6000):
        if any(p.stat().st_size > 0 for p in killed.glob(part)):
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (results(killed) / "results.json").exists()
    told = finish(start(f"run={killed}", *ASKED))
    assert "of 60 answers are there already" in told
    same(results(whole), results(killed))

    finish(start(f"run={two}", *ASKED, ranks=2))
    same(results(whole), results(two))
    timing = json.loads((results(two) / "timing.json").read_text())["benchmarks"]["easy_vqa"]
    assert timing["ranks"] == 2 and timing["vision_calls"] == timing["distinct_images"]

    kept = {name: (results(two) / name).read_bytes() for name in FILES}
    shutil.rmtree(two / "bundle")  # there is no model any more
    told = finish(start(f"rescore={results(two)}"))
    assert "rescored" in told
    assert {name: (results(two) / name).read_bytes() for name in FILES} == kept

    weights = other / "bundle" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    finish(start(f"run={other}", *ASKED))
    hashes = [
        json.loads((results(r) / "results.json").read_text())["metrics"]["easy_vqa/accuracy"]
        for r in (whole, other)
    ]
    assert hashes[0]["inference_hash"] != hashes[1]["inference_hash"]
    assert hashes[0]["scoring_hash"] == hashes[1]["scoring_hash"]

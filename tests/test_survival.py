"""A training that is killed at any moment and continued ends in the bits of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from triptych.checkpoint import latest

MEASURED = ("speed/", "memory/", "time")  # what differs between two equal runs
READY = "ready"  # appears when a process begins to train


def train_here(config: str, folder: str) -> None:
    """One process of a run: continue what is in `folder` to the end. Runs in a fork of a server
    that has imported everything, so that a start costs milliseconds."""
    import pytorch_lightning as pl

    from triptych.run import train
    from triptych.rundir import claim_run_dir

    fit = pl.Trainer.fit

    def ready(*args, **kwargs) -> None:
        Path(folder).with_suffix(f".{READY}").touch()
        fit(*args, **kwargs)

    pl.Trainer.fit = ready  # in this process alone

    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    claim_run_dir(folder, resume=True)
    train(OmegaConf.create(config), Path(folder))


@pytest.fixture(scope="module")
def server():
    """A context whose processes are forked from one that has the imports but ran nothing."""
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llama")]
    context.set_forkserver_preload(["peft", "triptych.run", "triptych.data.readers", *models])
    return context


@pytest.fixture(scope="module")
def config(tiny, pictures, tmp_path_factory) -> str:
    """A small LLaVA with LoRA and dropout that saves after every step."""
    from triptych.bundle import compose_preset

    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for i, ref in enumerate(pictures):
        ref.open().save(folder / f"{i}.png")
        for color in ("red", "blue", "green"):
            text = f"User: is it {color}?\nAssistant: {'yes' if i % 2 else 'no'}"
            rows.append({"image": f"{i}.png", "text": text})
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = [
        "peft=lora",
        "peft.lora.lora_dropout=0.2",
        "data=instructions",
        f"data.path={folder / 'mine.jsonl'}",
        f"data.images={folder}",
        "data.workers=0",
        "data.batch_size=1",
        "data.samples_per_row=2",
        f"model.vision.weights={tiny / 'vision'}",
        f"model.language.weights={tiny / 'language'}",
        "trainer.max_epochs=100",
        "trainer.log_every_n_steps=1",
        "checkpoint.steps=1",
        "benchmark=none",
        "ckpt=last",
    ]
    return OmegaConf.to_yaml(compose_preset("llava", options), resolve=True)


def start(server, config: str, folder: Path):
    folder.with_suffix(f".{READY}").unlink(missing_ok=True)
    process = server.Process(target=train_here, args=(config, str(folder)))
    process.start()
    return process


def saved(folder: Path) -> int:
    """The step of the last checkpoint, 0 if there is none."""
    last = latest(folder / "checkpoints")
    return int(last.stem.partition("-")[2]) if last else 0


def kill_at(process, folder: Path, step: int, delay: float) -> bool:
    """SIGKILL `delay` seconds after the run has saved a step; False if it had ended by itself.

    The moment hangs on steps and not on time, so that a busy machine does not change it.
    """
    ready = folder.with_suffix(f".{READY}")
    while process.is_alive() and not (ready.exists() and saved(folder) >= step):
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def left(folder: Path) -> tuple[dict, dict]:
    """Every tensor of the last checkpoint by its path, and all metrics by step."""
    flat = {}

    def walk(value, path: str) -> None:
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, entry in pairs:
                walk(entry, f"{path}/{key}")
        else:
            flat[path] = value

    walk(torch.load(latest(folder / "checkpoints"), weights_only=True), "")
    metrics = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if not key.startswith(MEASURED):
                assert (row["step"], key) not in metrics or key == "step"
                metrics[row["step"], key] = value
    return flat, metrics


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 16), pytest.param(20, 500, marks=pytest.mark.slow)]
)
def test_killed_at_random_and_continued_it_ends_in_the_same_bits(
    server, config, tmp_path, monkeypatch, kills, steps
):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    asked = OmegaConf.create(config)
    asked.trainer.max_steps = steps
    config = OmegaConf.to_yaml(asked)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(server, config, whole)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()[-3000:]

    chance, landed, reached = random.Random(0), 0, [0]
    for _ in range(kills):
        step = reached[-1] + chance.randint(not reached[-1], steps // (kills + 2))
        process = start(server, config, killed)
        landed += kill_at(process, killed, step, delay=chance.uniform(0, 0.03))
        reached.append(saved(killed))
    assert landed == kills and reached == sorted(reached)
    assert 0 < reached[-1] < steps  # it was killed in the middle, and did not lose what it had
    process = start(server, config, killed)
    process.join()
    assert process.exitcode == 0, (tmp_path / "killed.log").read_text()[-3000:]

    (tensors, metrics), (expected, rows) = left(killed), left(whole)
    assert tensors.keys() == expected.keys() and len(rows) >= steps
    for path, value in expected.items():
        if path.startswith("/loops/"):
            continue  # Lightning's counters of starts, which a restart rightly raises
        same = torch.equal(tensors[path], value) if torch.is_tensor(value) else None
        assert tensors[path] == value if same is None else same, path
    assert metrics == rows
    bundles = [(f / "bundle" / "weights.safetensors").read_bytes() for f in (whole, killed)]
    assert bundles[0] == bundles[1]
    assert not list((killed / "checkpoints").glob("*.writing"))

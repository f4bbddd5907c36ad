"""metrics.jsonl survives anything; W&B is a sink that never stops a run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from triptych.system import git_state, system_info
from triptych.tracking import RunLogger, read_metrics
from triptych.wandb_sink import WandbSink, wandb_mode


def steps(folder: Path) -> list:
    return [row["step"] for row in read_metrics(folder)]


def test_rows_are_there_at_once_and_floats_come_back(tmp_path):
    logger = RunLogger(tmp_path / "run")
    logger.log_metrics({"loss": torch.tensor(0.5), "bad": math.nan, "far": -math.inf}, step=3)
    logger.log_metrics({"acc": 1, "note": "é\n"})
    first, second = read_metrics(tmp_path / "run")
    assert (first["step"], first["loss"], first["far"]) == (3, 0.5, -math.inf)
    assert math.isnan(first["bad"]) and first["time"] >= 0
    assert (second["step"], second["acc"], second["note"]) == (None, 1, "é\n")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_killed_process_loses_no_row(tmp_path):
    child = os.fork()
    if child == 0:
        logger = RunLogger(tmp_path)
        for step in range(50):
            logger.log_metrics({"loss": step}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert steps(tmp_path) == list(range(50))


def test_a_continued_run_has_every_step_once(tmp_path):
    logger = RunLogger(tmp_path)
    for step in range(10):
        logger.log_metrics({"loss": 1.0}, step)
        if step % 5 == 4:
            logger.log_metrics({"val": 1.0}, step + 1)  # by hand, with global_step
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # the power went off here
    logger = RunLogger(tmp_path)
    logger.rewind(5)  # the checkpoint of 5 updates: rows 0-4, and what was logged after them
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 5]
    for step in range(5, 8):
        logger.log_metrics({"loss": 2.0}, step)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows if "loss" in r] == list(range(8))
    assert [r["loss"] for r in rows if "loss" in r] == [1.0] * 5 + [2.0] * 3
    assert [r["step"] for r in rows if "val" in r] == [5]
    assert [r["time"] for r in rows] == sorted(r["time"] for r in rows)


def test_a_run_that_starts_again_keeps_what_it_wrote_itself(tmp_path):
    RunLogger(tmp_path).log_metrics({"loss": 1.0}, 7)
    logger = RunLogger(tmp_path)
    logger.log_metrics({"before": 0.1}, 0)
    logger.rewind(0)
    logger.log_metrics({"loss": 3.0}, 0)
    assert [(r["step"], r.get("loss"), r.get("before")) for r in read_metrics(tmp_path)] == [
        (0, None, 0.1),
        (0, 3.0, None),
    ]


def test_system_info_is_plain_and_needs_no_git(tmp_path, monkeypatch):
    info = system_info({"seed": 1})
    assert json.loads(json.dumps(info)) == info
    assert info["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["config_sha256"] == system_info({"seed": 1})["config_sha256"]
    assert info["config_sha256"] != system_info({"seed": 2})["config_sha256"]
    assert git_state(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "new").touch()
    assert git_state(tmp_path)["dirty"] is True and len(git_state(tmp_path)["commit"]) == 40
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    import wandb

    wandb.teardown()  # settings are read from the environment once
    yield monkeypatch
    wandb.teardown()


def test_wandb_is_offline_without_a_key_or_a_server_within_three_seconds(no_account):
    began = time.monotonic()
    assert wandb_mode() == ("offline", "no API key is set (`wandb login` sets one)")
    import wandb

    wandb.teardown()
    no_account.setenv("WANDB_API_KEY", "0" * 40)
    no_account.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    assert wandb_mode() == ("offline", "127.0.0.1 does not answer")
    no_account.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == ("disabled", "")
    assert time.monotonic() - began < 3


def inspect(folder: Path) -> str:
    """All records of the offline run below a folder, as W&B's own tool shows them."""
    (run,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_an_offline_run_holds_metrics_config_and_pictures(no_account, tmp_path, capfd):
    from PIL import Image

    sinks = []
    for name in ("one", "two"):  # two runs of one process stay apart
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"seed: 3\noptim: {{lr: 0.25, name: {name}}}")
        sinks.append(WandbSink(tmp_path / name, group="sweep", tags=["a"]))
        sinks[-1].log_metrics({"loss": 0.125}, step=7)
    picture = Image.new("RGB", (4, 4), "red")
    sinks[0].log_samples([{"image": picture, "answer": "a red thing"}], step=7)
    for code, sink in enumerate(sinks):
        sink.finish(code)
        sink.log_metrics({"late": 1.0}, step=8)  # nothing happens
    assert "WANDB_DATA_DIR" not in os.environ
    said = capfd.readouterr().out
    assert said.count("no API key is set") == 2 and said.count("\n") == 2
    one, two = inspect(tmp_path / "one"), inspect(tmp_path / "two")
    for text, name in ((one, "one"), (two, "two")):
        assert "0.125" in text and "0.25" in text and name in text and "sweep" in text
    assert "samples" in one and "samples" not in two
    stored = [p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert any(data.startswith(b"\x89PNG") for data in stored)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_the_run(no_account, tmp_path, capfd):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        no_account.setenv("WANDB_API_KEY", "0" * 40)
        no_account.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        sink = WandbSink(tmp_path / "run", finish_timeout=5)
        sink.log_metrics({"loss": 0.125}, step=1)
        sink.finish()
        assert time.monotonic() - began < 60
    assert "logging offline" in capfd.readouterr().out
    assert "0.125" in inspect(tmp_path / "run")


def test_a_sink_that_fails_says_so_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    import wandb

    def broken(**options):
        raise OSError("no space left on device")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", broken)
    sink = WandbSink(tmp_path)
    for step in range(3):
        sink.log_metrics({"loss": 1.0}, step)
    sink.finish(1)
    assert capsys.readouterr().out == (
        "W&B: no space left on device; the run goes on, metrics.jsonl is complete\n"
    )


def test_no_sink_takes_a_row_twice(tmp_path, monkeypatch):
    import wandb

    sent = []

    class Run:
        id = "x"

        def define_metric(self, *args, **options):
            pass

        def log(self, row):
            sent.append(row)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    for logger in (RunLogger(tmp_path), WandbSink(tmp_path)):
        logger.log_metrics({"loss": 1.0}, step=7)  # a checkpoint had it written
        logger.log_metrics({"loss": 1.0}, step=7)  # Lightning's own turn
        logger.log_metrics({"loss": 1.0, "epoch": 0}, step=7)
        logger.log_metrics({"val": 2.0}, step=7)
        logger.log_metrics({"loss": 1.0}, step=8)
        logger.log_metrics({"note": 1.0})
        logger.log_metrics({"note": 1.0})
    rows = [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(tmp_path)]
    expected = [{"loss": 1.0}, {"epoch": 0}, {"val": 2.0}]
    expected = [row | {"step": 7} for row in expected] + [{"loss": 1.0, "step": 8}]
    assert sent == [*expected, {"note": 1.0}, {"note": 1.0}]
    assert rows == [*expected, {"note": 1.0, "step": None}, {"note": 1.0, "step": None}]

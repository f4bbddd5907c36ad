"""A sweep runs every job as a process of its own and says how each of them ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from triptych import cli
from triptych.config_check import quoted
from triptych.jobs import JobError, Sweep
from triptych.jobs_table import Job, judge
from triptych.rundir import record_outcome

SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from triptych import cli

    def state():
        import torch
        made = torch.zeros(1).dtype == torch.float64
        return float(made) + 2.0 * torch.are_deterministic_algorithms_enabled()

    @cli.main("train", resumes=lambda cfg: cfg.ckpt == "last", conf=Path(__file__).parent / "conf")
    def main(cfg):
        print(f"do {cfg.do}, seed {cfg.seed}", flush=True)
        if cfg.do == "raise":
            raise ValueError("no such\\nthing")
        if cfg.do == "exit":
            sys.exit(0)
        if cfg.do == "die":
            os._exit(3)
        if cfg.do == "wait":
            Path("started").touch()
            time.sleep(900)
        if cfg.do == "leak":
            import torch
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            os.environ["LEAKED"] = "1"
        if cfg.do in ("leak", "look"):
            return state() + 4.0 * ("LEAKED" in os.environ)
        with open("count", "a") as file:
            file.write("x")
        return [cfg.seed, os.getpid()] if cfg.do == "pid" else cfg.seed

    if __name__ == "__main__":
        main()
"""
TRAIN = """
    defaults:
      - _self_
      - override hydra/launcher: process
      - override hydra/output: run
      - override hydra/help: train
    hydra: {job: {config: {override_dirname: {exclude_keys: [ckpt]}}}}
    seed: 0
    ckpt: null
    do: nothing
    where: ""
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a script that obeys `do`, and its configuration."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text(dedent(TRAIN))
    shutil.copytree(cli.conf_dir() / "hydra", tmp_path / "conf" / "hydra")
    (tmp_path / "conf/hydra/output/run.yaml").write_text(
        (tmp_path / "conf/hydra/output/run.yaml")
        .read_text()
        .replace("${slug:${hydra:runtime.choices.model}}", "mine")
    )
    (tmp_path / "train.py").write_text(dedent(SCRIPT))
    return tmp_path


def start(tree: Path, *argv: str, **options) -> subprocess.Popen:
    names = ("RANK", "LOCAL_RANK", "HYDRA_FULL_ERROR")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    command = [sys.executable, str(tree / "train.py"), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command,
        env=environment,
        # shells start what is in the background with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **({"cwd": tree} | pipes | options),
    )


def run(tree: Path, *argv: str, **options) -> tuple[int, str, str]:
    process = start(tree, *argv, **options)
    out, error = process.communicate(timeout=900)
    return process.returncode, out, error


def table(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "jobs.json").read_text())
    return {row["overrides"][0].partition("=")[2]: row for row in rows}


def test_a_sweep_goes_on_says_how_each_job_ended_and_nothing_leaks(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    argv = ("-m", "do=leak,raise,exit,look", "hydra.sweep.dir=sweep")
    code, out, error = run(tree, *argv, cwd=elsewhere)
    jobs = table(elsewhere / "sweep")
    assert {do: row["state"] for do, row in jobs.items()} == {
        "leak": "finished",
        "raise": "failed",
        "exit": "exited early",
        "look": "finished",
    }
    assert jobs["leak"]["value"] == 7.0 and jobs["look"]["value"] == 0.0
    assert jobs["raise"]["reason"] == "ValueError: no such thing"
    assert jobs["exit"]["reason"].startswith("sys.exit(0) in train.py, line 17 before the run")
    assert code == 1 and "ValueError: no such thing" in error
    for do, row in jobs.items():
        assert f"do {do}, seed 0" in out  # what a job prints is seen, and kept
        assert f"do {do}, seed 0" in (elsewhere / row["directory"] / "output.log").read_text()
        assert (elsewhere / row["directory"] / ".hydra" / "overrides.yaml").is_file()
        assert any(do in line and row["state"] in line for line in out.splitlines()[-7:])
    assert "Traceback" in (elsewhere / jobs["raise"]["directory"] / "output.log").read_text()
    assert (elsewhere / "sweep" / "jobs.md").read_text().count("\n") == 6


def test_jobs_get_their_overrides_whole_and_can_run_side_by_side(tree):
    overrides = ("do=pid,die", "where='a, b=\\'c\\' {d}'", "seed=3", "hydra.launcher.jobs=2")
    code, out, _ = run(tree, "-m", *overrides, "hydra.sweep.dir='it\\'s, here'")
    jobs = table(tree / "it's, here")
    seed, pid = jobs["pid"]["value"]
    assert code == 1 and seed == 3 and pid > 0
    assert (jobs["die"]["state"], jobs["die"]["code"]) == ("failed", 3)
    assert "[0] do pid, seed 3" in out and "[1] do die, seed 3" in out
    config = (tree / jobs["pid"]["directory"] / ".hydra" / "config.yaml").read_text()
    assert "a, b='c' {d}" in config


def test_a_sweep_that_is_continued_runs_what_had_not_finished(tree):
    argv = ("-m", "do=exit,nothing", "hydra.sweep.dir=sweep")
    assert run(tree, *argv)[0] == 1
    code, _, error = run(tree, *argv)
    assert code == 1 and "add ckpt=last" in error and (tree / "count").read_text() == "x"
    took = table(tree / "sweep")["nothing"]["seconds"]
    assert run(tree, *argv, "ckpt=last")[0] == 1
    jobs = table(tree / "sweep")
    assert jobs["nothing"]["seconds"] == took > 0
    assert (jobs["exit"]["state"], jobs["nothing"]["state"]) == ("exited early", "finished")
    assert (tree / "count").read_text() == "x"  # it had finished and is not run again


@pytest.mark.parametrize(
    "name", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_jobs_and_the_sweep(tree, name):
    process = start(tree, "-m", "do=wait,nothing", "hydra.sweep.dir=sweep")
    deadline = time.monotonic() + 600
    while not (tree / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(name)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + name
    jobs = table(tree / "sweep")
    assert {row["state"] for row in jobs.values()} == {"stopped"}
    assert jobs["nothing"]["reason"].startswith("not started") and "stopped" in out
    assert not (tree / "count").exists()


@pytest.mark.parametrize(
    ("code", "left", "state", "reason"),
    [
        (0, ("finished", 0.5), "finished", ""),
        (0, None, "exited early", "the process ended with code 0 before the run had finished"),
        (0, ("exited", None), "exited early", "why before the run had finished"),
        (1, ("failed", None), "failed", "why"),
        (1, ("finished", 0.5), "failed", "it broke"),  # at the interpreter's end
        (2, None, "failed", "it broke"),
        (143, ("exited", None), "stopped", "saved after SIGTERM; continue with ckpt=last"),
        (-9, None, "killed", "SIGKILL (often: out of memory)"),
        (-11, None, "killed", "SIGSEGV"),
    ],
)
def test_the_state_follows_from_what_the_run_left(tmp_path, code, left, state, reason):
    if left:
        record_outcome(tmp_path, left[0], left[1], "" if left[0] == "finished" else "why")
    (tmp_path / "log").write_text("Traceback ...\nerror: it broke\ntwo files written\n")
    job = Job(0, ["seed=1"], tmp_path)
    judge(job, code, tmp_path / "log")
    assert (job.state, job.reason) == (state, reason)
    assert job.value == (0.5 if state == "finished" else None)


def test_a_run_that_finished_may_exit_and_the_table_shows_its_scores(tmp_path):
    """Training and evaluation say themselves that they reached their end."""
    record_outcome(tmp_path, "finished", 0.25)
    entry = {"easy_vqa/accuracy": {"value": 0.25}, "easy_vqa/accuracy/color": {"value": 0.5}}
    (tmp_path / "results.json").write_text(json.dumps({"metrics": entry}))
    job = Job(0, [], tmp_path)
    judge(job, 0, None)
    assert job.metrics == {"easy_vqa/accuracy": 0.25}


def test_sweepers_get_what_a_job_returned_or_why_it_did_not(tmp_path):
    config = OmegaConf.create({"seed": 1, "hydra": {"job": {"name": "train"}}})
    sweep = Sweep(None, config)
    done = sweep._returned(Job(0, ["seed=1"], tmp_path, state="finished", value=0.5), config)
    assert (done.return_value, done.cfg, done.overrides) == (0.5, {"seed": 1}, ["seed=1"])
    early = sweep._returned(Job(1, [], tmp_path, state="exited early", reason="why"), config)
    assert early.status is JobStatus.FAILED
    with pytest.raises(JobError, match="exited early: why"):
        _ = early.return_value
    with pytest.raises(JobError, match="hydra.launcher.jobs=0"):
        Sweep(None, config, parallel=0)


@pytest.mark.parametrize("text", ["a b", "it's", "a,b={c}", "x\\", "\\'", "${y}"])
def test_quoted_values_survive_hydras_grammar(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert parsed.value() == text

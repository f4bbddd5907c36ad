"""How each job of a sweep ended, and the table of all of them."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.rundir import read_outcome

# States of a job. FINISHED is the only success.
FINISHED, FAILED, EXITED, KILLED, STOPPED = (
    "finished",
    "failed",
    "exited early",
    "killed",
    "stopped",
)
WAITING = "waiting"
TERMINATED = 143  # what a training ends with when SIGTERM made it save; see triptych.checkpoint
ERROR = re.compile(r"^(error:|[\w.]*(Error|Exception|Interrupt|Exit)\b)")
TAIL = 65536  # bytes of a log that are searched for its last error


@dataclass(eq=False)
class Job:
    """One job of a sweep; `directory` is where its run is."""

    number: int
    overrides: list[str]
    directory: Path
    command: list[str] = field(default_factory=list)
    state: str = WAITING
    reason: str = ""
    code: int | None = None
    value: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    before: bool = False  # an earlier sweep in this directory has finished it


def judge(job: Job, code: int | None, log: Path | None, stopped: bool = False) -> None:
    """Decide by what the run left behind how it ended, and fill in the job.

    `finished` asks for exit code 0 and for the run's own word in its outcome.json: the script
    returned, or training or evaluation reached its end. Code 0 without that word, as after
    `sys.exit(0)` in the middle, is `exited early`; after that word it counts as finished. Otherwise
    the job is `killed` (by a signal), `stopped` (with the sweep) or `failed`; the reason is the
    run's own, else the last error that its output holds.
    """
    outcome = read_outcome(job.directory) or {}
    ended, reason = outcome.get("state"), outcome.get("reason") or ""
    job.code = code
    if code == 0 and ended == FINISHED:
        job.state, job.value = FINISHED, outcome.get("value")
        job.metrics = main_metrics(job.directory, job.value)
    elif code == 0:
        job.state = EXITED
        job.reason = f"{reason or 'the process ended with code 0'} before the run had finished"
    elif stopped and code in (TERMINATED, -signal.SIGTERM, -signal.SIGKILL):
        saved = code == TERMINATED
        job.state = STOPPED
        job.reason = "saved; continue with ckpt=last" if saved else "ended with the sweep"
    elif code == TERMINATED:
        job.state, job.reason = STOPPED, "saved after SIGTERM; continue with ckpt=last"
    elif code is not None and code < 0:
        job.state, job.reason = KILLED, _signal_name(-code)
    else:
        job.state = FAILED
        job.reason = reason or _last_error(log) or f"ended with code {code}, without a word"


def main_metrics(directory: Path, value: Any) -> dict[str, float]:
    """The scores of a run without their slices; without a benchmark, the number it returned."""
    try:
        scores = json.loads((directory / "results.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        scores = {}
    found = {key: entry.get("value") for key, entry in scores.items() if key.count("/") == 1}
    if not found and isinstance(value, int | float):
        found = {"value": value}
    return {key: number for key, number in found.items() if number is not None}


def seconds_before(folder: Path, directory: Path) -> float:
    """What the sweep's table says a job took that finished in an earlier call; 0 if nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        rows = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
        here = directory.resolve()
        return sum(row["seconds"] for row in rows if Path(row["directory"]).resolve() == here)
    return 0.0


def write_tables(folder: Path, jobs: list[Job]) -> str:
    """Write jobs.json and jobs.md in one move each; returns the table as plain text."""
    columns = ("overrides", "state", "reason", "code", "value", "metrics", "seconds")
    rows = [
        {"job": job.number, "directory": str(job.directory)} | {c: getattr(job, c) for c in columns}
        for job in jobs
    ]
    _replace(folder / "jobs.json", json.dumps(rows, indent=1) + "\n")
    head = ["job", "overrides", "state", "main metrics", "time", "directory", "reason"]
    cells = [_cells(job, folder) for job in jobs]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    lines = [head, ["---"] * len(head), *escaped]
    _replace(folder / "jobs.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(job: Job, folder: Path) -> list[str]:
    minutes, seconds = divmod(round(job.seconds), 60)
    return [
        str(job.number),
        " ".join(job.overrides) or "-",
        job.state,
        ", ".join(f"{key} {number:.4g}" for key, number in job.metrics.items()) or "-",
        f"{minutes}:{seconds:02}",
        os.path.relpath(job.directory, folder),
        job.reason,
    ]


def _last_error(log: Path | None) -> str:
    """The last line of an output that reads like an error, else its last line."""
    try:
        with open(log or "", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    error = next((line for line in reversed(lines) if ERROR.match(line)), "")
    return (error or (lines[-1] if lines else "")).removeprefix("error: ")


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    memory = " (often: out of memory)" if number == signal.SIGKILL else ""
    return f"{name}{memory}"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)

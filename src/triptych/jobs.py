"""The jobs of a sweep: each a process of its own, with a table of how all of them ended."""

from __future__ import annotations

import codecs
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from triptych.config_check import quoted
from triptych.jobs_table import FINISHED, STOPPED, Job, judge, seconds_before, write_tables
from triptych.rundir import clear_outcome, rank, read_outcome

log = logging.getLogger(__name__)

# Overrides of the sweep itself, which mean nothing to one of its jobs.
SWEEPS_OWN = (
    "hydra.mode",
    "hydra.run.",
    "hydra.sweep.",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.job.num",
    "hydra.job.id",
)


class JobError(CompactHydraException):
    """One job of a sweep failed for a reason that its sentence explains."""


class Sweep:
    """Runs batches of jobs for Hydra's sweepers and keeps the table of all of them.

    SWEEP/jobs.json and jobs.md are written anew after every job; each job's terminal output is in
    its `output.log`. With `ckpt=last` a job that has finished in its directory is not run again.
    Ctrl-C, SIGTERM and SIGHUP are passed on as SIGTERM, which lets a training save; a second one,
    or `grace` seconds, kills. The sweep then ends with 130 or 143.
    """

    def __init__(
        self, loader: ConfigLoader, config: DictConfig, parallel: int = 1, grace: float = 60.0
    ) -> None:
        if parallel < 1:
            raise JobError(f"error: hydra.launcher.jobs={parallel} runs nothing; use 1 or more.")
        self.loader, self.config, self.parallel, self.grace = loader, config, parallel, grace
        self.jobs: list[Job] = []
        self._running: dict[Job, _Process] = {}
        self._signal: int | None = None
        self._kill_at = float("inf")

    def run(self, batch: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """One batch in order, at most `parallel` at a time; returns what each job returned."""
        setup_globals()
        if "TORCHELASTIC_RUN_ID" in os.environ or rank():
            raise JobError(
                "error: a sweep starts its jobs itself, and torchrun would start it on every rank; "
                "run it with python and set trainer.devices."
            )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.folder = Path(str(self.config.hydra.sweep.dir))
        if not self.jobs and (self.folder / "jobs.json").exists() and not _resumes(self.config):
            raise JobError(
                f"error: '{self.folder}' holds a sweep already; add ckpt=last to continue it, or "
                "choose another hydra.sweep.dir=DIR"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        made = [self._job(list(overrides), first + i) for i, overrides in enumerate(batch)]
        with self._signals():
            self._work([job for job, _ in made])
        print(f"\n{write_tables(self.folder, self.jobs)}\nSweep directory: {self.folder}")
        if self._signal is not None:
            raise SystemExit(128 + self._signal)
        return [self._returned(job, config) for job, config in made]

    def _job(self, overrides: list[str], number: int) -> tuple[Job, DictConfig]:
        """A job with its directory and its composed configuration, as Hydra's launchers do it."""
        config = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        directory = self.folder / str(OmegaConf.select(config, "hydra.sweep.subdir"))
        if any(job.directory == directory for job in self.jobs):  # a sweeper asks once more
            directory = directory.with_name(f"{directory.name}_{number}")
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = os.path.abspath(directory)
        job = Job(number, list(filter_overrides(overrides)), directory)
        job.command = [*_script(), *overrides, *self._hydra_overrides(job), *_flags()]
        if _resumes(config) and (read_outcome(directory) or {}).get("state") == FINISHED:
            job.before, job.seconds = True, seconds_before(self.folder, directory)
        self.jobs.append(job)
        return job, config

    def _hydra_overrides(self, job: Job) -> list[str]:
        given = OmegaConf.to_container(self.config.hydra.overrides.hydra)
        kept = [text for text in given if not text.lstrip("+~").startswith(SWEEPS_OWN)]
        return [
            *kept,
            "hydra.mode=RUN",
            f"hydra.run.dir={quoted(job.directory)}",
            f"hydra.sweep.dir={quoted(self.folder)}",
            f"hydra.sweep.subdir={quoted(job.directory.relative_to(self.folder))}",
            f"hydra.job.num={job.number}",
            f"hydra.job.id={quoted(job.number)}",
        ]

    def _work(self, jobs: list[Job]) -> None:
        """Start, watch and judge the jobs until none is left."""
        waiting = deque(jobs)
        while self._running or (waiting and self._signal is None):
            while waiting and self._signal is None and len(self._running) < self.parallel:
                job = waiting.popleft()
                if job.before:
                    judge(job, code=0, log=None)
                    log.info(f"job {job.number} finished before: {job.directory}")
                    continue
                log.info(f"job {job.number}: {' '.join(job.overrides)} -> {job.directory}")
                self._running[job] = _Process(job, self.parallel)
            time.sleep(0.05)
            if self._signal is not None:
                late = time.monotonic() > self._kill_at
                for process in self._running.values():
                    process.kill() if late else process.terminate()
            for job, process in list(self._running.items()):
                if process.poll() is not None:
                    process.close()
                    del self._running[job]
                    job.seconds = time.monotonic() - process.began
                    judge(job, process.code, process.log, stopped=self._signal is not None)
                    log.info(f"job {job.number} {job.state} in {job.seconds:.0f} s {job.reason}")
                    write_tables(self.folder, self.jobs)
        for job in waiting:
            job.state, job.reason = STOPPED, "not started: the sweep was stopped"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on to the jobs while they run; they stand in sessions of their own."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [name for name in names if signal.getsignal(name) is not signal.SIG_IGN]  # nohup
        before = {name: signal.signal(name, self._on_signal) for name in heard}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        first, self._signal = self._signal is None, self._signal or number
        self._kill_at = time.monotonic() + (self.grace if first else 0)

    def _returned(self, job: Job, config: DictConfig) -> JobReturn:
        task = deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        result = JobReturn(
            overrides=job.overrides,
            cfg=task,
            hydra_cfg=OmegaConf.create({"hydra": OmegaConf.to_container(config.hydra)}),
            working_dir=str(job.directory),
            task_name=str(config.hydra.job.name),
        )
        done = job.state == FINISHED
        result.status = JobStatus.COMPLETED if done else JobStatus.FAILED
        result.return_value = job.value if done else JobError(f"{job.state}: {job.reason}")
        return result


class _Process:
    """One running job; what it prints is shown here and kept in DIRECTORY/output.log."""

    def __init__(self, job: Job, parallel: int) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        clear_outcome(job.directory)
        self.log, self.began = job.directory / "output.log", time.monotonic()
        environment = {"PYTHONUNBUFFERED": "1", **os.environ}
        if parallel > 1:  # all jobs would otherwise use all cores
            share = max(1, (os.cpu_count() or 1) // parallel)
            environment = {"OMP_NUM_THREADS": str(share), **environment}
        self._process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which lets the job save
        )
        self._asked = False
        prefix = f"[{job.number}] " if parallel > 1 else ""
        self._reader = threading.Thread(target=self._copy, args=(prefix,), daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        """Ask once, with SIGTERM, to save and end."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def kill(self) -> None:
        """Kill the job with all it has started: ranks, and workers that read data."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave no process behind, and wait for the last words."""
        self.kill()
        self._reader.join(timeout=5)

    def _copy(self, prefix: str) -> None:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
        with open(self.log, "ab") as log_file:
            while chunk := self._process.stdout.read1(65536):
                log_file.write(chunk)
                log_file.flush()
                text = decoder.decode(chunk)
                if prefix:  # whole lines, or those of several jobs would mix
                    *lines, rest = re.split(r"[\r\n]+", rest + text)
                    text = "".join(f"{prefix}{line}\n" for line in lines if line)
                with suppress(OSError, ValueError):  # our own reader may be gone: `| head`
                    sys.stdout.write(text)
                    sys.stdout.flush()


def _script() -> list[str]:
    """What the interpreter was started with: a script, or `-m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec is not None else [sys.argv[0]]


def _flags() -> list[str]:
    """The flags that choose the configuration, which every job needs too."""
    args = get_args_parser().parse_args(sys.argv[1:])
    chosen = {name: getattr(args, name) for name in ("config_path", "config_name", "config_dir")}
    return [
        word
        for name, value in chosen.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]


def _resumes(config: DictConfig) -> bool:
    return config.get("ckpt") == "last"


__all__ = ["JobError", "Sweep", "quoted"]

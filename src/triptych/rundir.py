"""Run directories: each belongs to one run, and to one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from triptych.errors import ConfigError

CLAIM = ".claim"  # the marker of a directory that belongs to a run
OUTCOME = "outcome.json"  # how the run ended, in its own words
RUN_FILES = (CLAIM, "config.yaml", "metrics.jsonl", "results.json", "checkpoints", "bundle")
_held: list[Any] = []  # open markers: their locks last as long as the process


def claim_run_dir(path: str | Path, resume: bool) -> Path:
    """Make a directory this process's own, creating it if needed.

    The marker is created atomically, so of two processes one gets the directory; it stays locked
    while the process lives, so that a run is not continued while it is still going on. Raises
    ConfigError if the directory holds a run and `resume` is false, or is in use.
    """
    import fcntl

    path = Path(path)
    check_run_dir(path, resume)
    path.mkdir(parents=True, exist_ok=True)
    mode = "r+" if resume and (path / CLAIM).exists() else "x"
    try:
        marker = open(path / CLAIM, mode)  # noqa: SIM115 (closing it would release the lock)
    except FileExistsError:
        raise ConfigError(_taken(path)) from None
    try:
        # POSIX locks are not inherited: workers that outlive a killed run do not hold it.
        fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"the run in '{path}' is still going on; stop it or wait for its end, then continue it."
        ) from None
    except OSError:  # a file system without locks: the marker alone has to do
        pass
    marker.truncate(0)
    marker.write(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
    marker.flush()
    _held.append(marker)
    return path


def release_run_dir(path: str | Path) -> None:
    """Give back a directory in which nothing was run."""
    (Path(path) / CLAIM).unlink(missing_ok=True)


def record_outcome(path: str | Path, state: str, value: Any = None, reason: str = "") -> None:
    """Leave in a run's directory how it ended: finished with a value, or why it did not.

    A value that JSON cannot hold is left out; what cannot be written is not an error of the run.
    """
    if rank():
        return
    row = {"state": state, "value": _plain(value), "reason": " ".join(reason.split())}
    beside = Path(path) / f"{OUTCOME}.part"
    with suppress(OSError):
        beside.write_text(json.dumps(row) + "\n", encoding="utf-8")
        os.replace(beside, Path(path) / OUTCOME)


def read_outcome(path: str | Path) -> dict[str, Any] | None:
    """How the run of a directory ended; None if it did not say."""
    try:
        return json.loads((Path(path) / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def clear_outcome(path: str | Path) -> None:
    """Forget how an earlier run in a directory ended, when it is continued."""
    if not rank():
        (Path(path) / OUTCOME).unlink(missing_ok=True)


def check_run_dir(path: Path, resume: bool) -> None:
    """Raise ConfigError if the directory holds anything of a run and `resume` is false."""
    if not resume and any((path / name).exists() for name in RUN_FILES):
        raise ConfigError(_taken(path))


def slug(text: object, longest: int = 80) -> str:
    """A file name that reads like `text`; where characters were lost, a hash keeps it unique."""
    raw = str(text)
    name = re.sub(r"[^\w.,=+-]+", "-", raw).strip("-.")[:longest]
    lossless = name and name == re.sub(r"[/ ]", "-", raw)
    return name if lossless else f"{name}-{hashlib.sha1(raw.encode()).hexdigest()[:6]}".lstrip("-")


def evaluation_dir(run: object, model: object, options: object, rescored: object = None) -> str:
    """Where evaluate.py writes: DIR/eval/HASH of the options, or a new directory for a preset.

    Stored answers that are judged anew stay where they are; only Hydra's own files go below.
    """
    if rescored is not None:
        return f"{rescored}/rescored"
    if run is not None:
        return f"{run}/eval/{hashlib.sha1(str(options).encode()).hexdigest()[:8]}"
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    return f"runs/{now}_{slug(model)}_eval_{secrets.token_hex(3)}"


def rank() -> int:
    """This process's rank, before torch knows of it."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[n]) for n in names if n in os.environ), 0)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _taken(path: Path) -> str:
    return (
        f"'{path}' holds a run already; add ckpt=last to continue it, or choose another "
        "hydra.run.dir=DIR"
    )


OmegaConf.register_new_resolver("slug", slug, replace=True)
OmegaConf.register_new_resolver(
    "unique", lambda: secrets.token_hex(3), use_cache=True, replace=True
)
OmegaConf.register_new_resolver("evaluation_dir", evaluation_dir, use_cache=True, replace=True)

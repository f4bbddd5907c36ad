"""What a run writes down while it trains: metrics.jsonl is the source of truth, W&B a sink of it.

Both are Lightning loggers and give the same numbers; a process that is killed loses no row of
metrics.jsonl, whereas an offline W&B file is flushed in blocks and may lose its last minutes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from triptych.system import system_info as system_info

METRICS = "metrics.jsonl"
# JSON has no such numbers: metrics.jsonl holds these words, read_metrics gives floats again.
SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Repeats:
    """Knows the row of a step that was logged last: a checkpoint has it written before Lightning's
    own turn, which then brings it again.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._seen: set[str] = set()

    def without(self, values: dict[str, Any], step: int | None) -> dict[str, Any]:
        """What of a row is new: all of it, or what a repetition adds."""
        if step is not None and step == self._step and self._seen <= values.keys():
            return {key: value for key, value in values.items() if key not in self._seen}
        self._step, self._seen = step, set(values)
        return values


class RunLogger(Logger):
    """Writes FOLDER/metrics.jsonl: a row `{"step", "time", metric: value ...}`, flushed at once.

    `time` is in seconds since the run began, pauses between its parts left out. Rows of the same
    step may hold different metrics (training, validation, evaluation).
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._dir = Path(folder)
        self._file: Any = None
        self._earlier = 0  # rows that earlier processes have written
        self._repeats: int | None = None  # the step at which a continued run writes again
        self._offset = 0.0
        self._repeated = Repeats()
        self._start = time.monotonic()

    @property
    def name(self) -> str:
        return self._dir.name

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self._dir)

    @property
    def save_dir(self) -> str:
        return str(self._dir)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._open()
        values = {key: _plain(value) for key, value in metrics.items()}
        values = self._repeated.without(values, step)
        if not values:
            return
        if step is not None and step == self._repeats:
            self._rewrite(lambda at, row: at >= self._earlier or not _same(row, step, values))
        now = round(self._offset + time.monotonic() - self._start, 3)
        row = {"step": step, "time": now} | values
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Continue after `step` optimizer steps: forget what the steps lost since then had written.

        Lightning counts rows from 0, the row of the n-th step is n - 1; what is logged by hand with
        `global_step` counts from 1. So rows above `step` go at once, and those at `step` when the
        same metrics are written there again.
        """
        self._open()
        self._rewrite(lambda at, row: at >= self._earlier or (row["step"] or 0) <= step)
        self._repeats = step

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.flush()

    def _open(self) -> None:
        if self._file is not None:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / METRICS
        if path.exists():
            self._earlier = len(_lines(path))
            self._rewrite(lambda at, row: True)  # drops a last row cut short by a crash
        else:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)

    def _rewrite(self, keep: Callable[[int, dict], bool]) -> None:
        """Keep some rows, by number and content, and go on behind them; atomic."""
        path, side = self._dir / METRICS, self._dir / f"{METRICS}.new"
        if self._file is not None:
            self._file.close()
        kept = [(at, row) for at, row in enumerate(_lines(path)) if keep(at, row)]
        side.write_text("".join(json.dumps(row) + "\n" for _, row in kept), encoding="utf-8")
        os.replace(side, path)
        earlier = [row for at, row in kept if at < self._earlier]
        self._earlier = len(earlier)
        self._offset = max((row["time"] for row in earlier), default=0.0)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of FOLDER/metrics.jsonl, with NaN and Inf as floats.

    A last row cut short by a crash is left out. Raises FileNotFoundError if there is no such file.
    """
    rows = _lines(Path(folder) / METRICS)
    return [{k: SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]


def _plain(value: Any) -> Any:
    """A number JSON can hold; tensors and NumPy scalars of one element become floats."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _same(row: dict, step: int, values: dict) -> bool:
    return row["step"] == step and bool(row.keys() & values.keys() - {"step", "time", "epoch"})


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a whole row ends with a newline

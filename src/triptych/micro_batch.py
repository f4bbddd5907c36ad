"""Split a batch that would not fit into micro-batches, so that the effective batch stays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from triptych.forecast import GIB, Forecast
from triptych.hardware import return_memory

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from triptych.build import Adapted
    from triptych.data.datamodule import DataModule

MEMINFO = Path("/proc/meminfo")  # Linux; elsewhere nothing is split unless a limit is set


KEPT = 2.0  # resident memory by that of tensors, while freed blocks stay with the process


def room_gb(limit_gb: float | None) -> float:
    """GiB that tensors of a step may take: the limit that was set, or 90 % of what is free."""
    if limit_gb is not None:
        return limit_gb
    if torch.cuda.is_available():
        return 0.9 * torch.cuda.mem_get_info()[1] / GIB
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    free = [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")]  # KiB
    return 0.9 * free[0] / GIB if free else float("inf")


def splits(batch: int) -> list[int]:
    """Into how many equal parts a batch divides, the fewest first."""
    return [parts for parts in range(1, batch + 1) if batch % parts == 0]


def split_to_fit(
    cfg: DictConfig, adapted: Adapted, trainer: pl.Trainer, data: DataModule
) -> tuple[Forecast, str]:
    """The forecast of the largest micro-batch that fits, and what was changed, in words.

    Rows of a micro-batch times micro-batches of a step stay what the configuration asks for; the
    loss is divided by the counts of the whole step, so the numbers stay too. An objective that
    compares the samples of a batch is not split: its `chunk` does that.
    """
    from triptych.forecast import forecast, largest

    rows, accumulate, room = data.batch_size, data.accumulate, room_gb(cfg.memory.limit_gb)
    whole = data.objective.in_batch or not hasattr(data, "plan")  # a stream has no rows to split
    ways = [1] if whole else splits(rows)
    for parts in ways:
        data.batch_size, data.accumulate = rows // parts, accumulate * parts
        found = forecast(cfg, adapted, largest(data), trainer.precision, data.accumulate)
        if found.problem or found.peak <= room * GIB:
            break
    trainer.accumulate_grad_batches = data.accumulate
    fits = bool(found.problem) or found.peak <= room * GIB
    if parts == 1 and fits:
        return found, ""
    if not fits:
        cure = (
            "set objective.chunk"
            if data.objective.in_batch
            else "try memory.checkpoint=[language], peft=qlora or a shorter data.max_length"
        )
        return found, f"a step may need more than the {room:.1f} GiB there are; {cure}."
    return found, (
        f"{rows} rows a batch would not fit into {room:.1f} GiB: {data.accumulate} micro-batches "
        f"of {data.batch_size} rows make the same step."
    )


def spare_memory(found: Forecast, limit_gb: float | None) -> str:
    """On a CPU: hand freed blocks back if keeping them might not fit, and say so.

    Steps are slower so, and resident memory follows the forecast.
    """
    room = room_gb(limit_gb)
    if found.problem or KEPT * found.peak <= room * GIB:
        return ""
    return_memory()
    return (
        f"freed memory is handed back, which takes time: kept, it may be {KEPT:g} times the peak, "
        f"and there are {room:.1f} GiB."
    )

"""The data module: rows to batches, with the counts of each accumulation window."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from triptych.data.rows import Rows, RowSampler
from triptych.distributed import rank, total, world
from triptych.objectives.base import Objective
from triptych.types import Batch, ImageRef, Sample, TriptychError


class DataModule(pl.LightningDataModule):
    """Training rows of one reader.

    batch_size: rows (images with their questions) of a micro-batch. samples_per_row: most samples
    that share a row (1 for a model whose processor does not pack). workers: processes that prepare
    batches; null follows the cores.
    """

    def __init__(
        self,
        train: Sequence[Sample],
        processor: Any,
        objective: Objective,
        batch_size: int = 16,
        samples_per_row: int = 16,
        draw: int | None = None,
        max_length: int = 2048,
        workers: int | None = 0,
        seed: int = 0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        if not len(train):
            raise TriptychError("the training set is empty; check data.path and the split.")
        self.reader, self.processor, self.objective = train, processor, objective
        processor.max_length = max_length
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.workers = max(0, (os.cpu_count() or 1) - 1) if workers is None else workers
        packed = samples_per_row if getattr(processor, "packs", True) else 1
        self.plan = objective.plan(train, packed, draw, seed)
        self.sampler: RowSampler | None = None
        self._resume = (0, 0)

    def first_rows(self, count: int) -> list[list[Sample]]:
        """The samples of the first rows of the first epoch."""
        return [[self.reader[i] for i in row] for row in self.plan.rows(0)[:count]]

    def references(self) -> Iterator[ImageRef]:
        """Every image of the training set, for caches that are filled before it starts."""
        return (ref for i in range(len(self.reader)) for ref in self.reader[i].images)

    def train_dataloader(self) -> Windows:
        self.sampler = RowSampler(self.plan, self.batch_size, rank(), world())
        self.sampler.epoch, self.sampler.skip = self._resume
        if self.workers:
            self._check_travels()
        loader = DataLoader(
            Rows(self.reader),
            batch_sampler=self.sampler,
            collate_fn=self.processor.rows,
            num_workers=self.workers,
            persistent_workers=False,
            pin_memory=False,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one alone
        )
        return Windows(loader, self.objective, self.accumulate)

    def _check_travels(self) -> None:
        """Refuse samples that cannot be sent between processes: workers would hang in silence."""
        try:
            pickle.dumps(self.first_rows(1))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TriptychError(
                f"samples of {type(self.reader).__name__} cannot be sent from a worker process "
                f"({error}); set data.workers=0, or make their images' `load` a module's function."
            ) from error

    def state_dict(self) -> dict[str, int]:
        """Where the data stands: the epoch, and its batches already used."""
        loop = self.trainer.fit_loop
        used = loop.epoch_loop.batch_progress.current.ready
        size = self.batch_size
        return {"epoch": self.trainer.current_epoch, "batch": used, "batch_size": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue an interrupted epoch behind the batches it has already used.

        They may have been of another size: memory decides into how many a step is split.
        """
        used = state["batch"] * state.get("batch_size", self.batch_size)
        self._resume = (state["epoch"], used // self.batch_size)


class Windows:
    """A loader that reads one accumulation window ahead and tells each batch the window's counts.

    Every term of the loss is divided by its count over the window and all ranks, so that two
    micro-batches of four weigh each sample as one batch of eight does.
    """

    def __init__(self, loader: DataLoader, objective: Objective, accumulate: int) -> None:
        self.loader, self.objective, self.accumulate = loader, objective, accumulate
        self.batch_sampler = loader.batch_sampler  # Lightning finds set_epoch through it

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        window: list[Batch] = []
        for batch in self.loader:
            window.append(batch)
            if len(window) == self.accumulate:
                yield from stamped(window, self.objective)
                window = []
        yield from stamped(window, self.objective)


def stamped(window: list[Batch], objective: Objective) -> Iterator[Batch]:
    """The batches of one optimizer step, each told the counts of all of them and of all ranks."""
    sums: dict[str, int] = {}
    for batch in window:
        for name, count in objective.counts(batch).items():
            sums[name] = sums.get(name, 0) + count
    sums = total(sums) if window else sums
    for batch in window:
        batch.totals = sums
        yield batch

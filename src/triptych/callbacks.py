"""Callbacks that watch over every run: progress, speed, gradient norms, and NaN."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor
from torch.nn.utils import get_total_norm

from triptych.hardware import peak_ram
from triptych.types import Batch, TriptychError


class Throughput(pl.Callback):
    """Logs samples and tokens per second, time spent waiting for data, and peak memory.

    Speeds are means since the last log and count all ranks; validation and the writing of
    checkpoints are left out. `speed/data_wait_s` is in seconds a step, `speed/data_wait` its share
    of the time. Memory is this process's peak so far, in GiB.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}  # the latest values, for the progress bar
        self._logged_at = 0
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):  # a continued run writes its lost steps again
                logger.rewind(trainer.global_step)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._logged_at = trainer.global_step
        self._reset()
        self._ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int
    ) -> None:
        self._started = time.perf_counter()
        if not self._paused:
            self._waited += self._started - self._ended
        self._paused = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Batch, index: int
    ) -> None:
        self._ended = time.perf_counter()
        self._worked += self._ended - self._started
        self._samples += len(batch.samples)
        # Summed on the device and read only when logged, or each step would wait for the GPU.
        self._tokens = self._tokens + sum(t.mask.sum() for t in batch.text.values())
        step = trainer.global_step
        if step > self._logged_at and _logs_at(trainer, step):
            self.rates = self._rates(trainer.world_size, step - self._logged_at)
            module.log_dict(self.rates)
            self._logged_at = step
            self._reset()

    def on_validation_start(self, *_: Any) -> None:
        self._paused = True

    def on_save_checkpoint(self, *_: Any) -> None:
        self._paused = True

    def _reset(self) -> None:
        self._started = self._ended = time.perf_counter()
        self._waited = self._worked = 0.0
        self._paused = False
        self._samples = 0
        self._tokens: int | Tensor = 0

    def _rates(self, ranks: int, steps: int) -> dict[str, float]:
        seconds = max(self._waited + self._worked, 1e-9)
        rates = {
            "speed/samples_per_s": ranks * self._samples / seconds,
            "speed/tokens_per_s": ranks * int(self._tokens) / seconds,
            "speed/data_wait_s": self._waited / steps,
            "speed/data_wait": self._waited / seconds,
            "memory/peak_rss_gib": peak_rss(),
        }
        if torch.cuda.is_available():
            rates["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return rates


class Progress(TQDMProgressBar):
    """The progress bar with loss, learning rate, samples/s and the share of waiting for data.

    On a terminal it is drawn at each step, in a log file every 50. Speeds come from `Throughput`.
    """

    def __init__(self, loss: str = "train/loss") -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 50)
        self.loss = loss

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
        shown = {}
        # callback_metrics hold the last micro-batch; "_step" is Lightning's when epochs log too.
        for name in (self.loss, f"{self.loss}_step"):
            if name in trainer.callback_metrics:
                shown["loss"] = f"{float(trainer.callback_metrics[name]):.4f}"
        rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        if rates:
            shown["lr"] = f"{max(rates):.2e}"
        speed = next((c.rates for c in trainer.callbacks if isinstance(c, Throughput)), {})
        if speed:
            shown["samples/s"] = f"{speed['speed/samples_per_s']:.1f}"
            shown["wait"] = f"{speed['speed/data_wait']:.0%}"
        return shown


class GradNorms(pl.Callback):
    """Logs the gradient norm of each part, before clipping, as `grad/ROLE` and `grad/all`.

    A part is the first component of a parameter's name below `module.model`: its role.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not _logs_at(trainer, trainer.global_step + 1):
            return
        parts = gradients(module)
        norms = {
            f"grad/{part}": get_total_norm(list(grads.values())) for part, grads in parts.items()
        }
        if norms:
            norms["grad/all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
            module.log_dict(norms)


class FiniteGuard(pl.Callback):
    """Stops before NaN or Inf reaches the weights, and names the samples they came from.

    Losses and gradients are read once an optimizer step, so that no micro-batch waits for the GPU.
    Under float16 the gradient scaler skips steps with infinite gradients: then losses alone count.
    """

    def __init__(self) -> None:
        self._window: list[tuple[str, Tensor]] = []  # (sample ids, loss) since the last step
        self._ids = ""

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int
    ) -> None:
        self._ids = batch.ids

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._window.append((self._ids, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        window, self._window = self._window, []
        step = trainer.global_step + 1
        losses = torch.stack([loss for _, loss in window]).tolist() if window else []
        for (ids, _), loss in zip(window, losses, strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise TriptychError(
                    f"the loss is {loss} at step {step} on the samples {ids}; check these samples, "
                    "or lower optim.lr. The weights are those of the step before."
                )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        parts = gradients(module)
        every = [grad for grads in parts.values() for grad in grads.values()]
        if every and not bool(torch.isfinite(get_total_norm(every, float("inf")))):
            name = next(
                f"{part}.{name}"
                for part, grads in parts.items()
                for name, grad in grads.items()
                if not bool(torch.isfinite(grad).all())
            )
            raise TriptychError(
                f"the gradient of {name} is not finite at step {step}, with finite losses, on the "
                f"samples {'; '.join(ids for ids, _ in window)}; check these samples, or lower "
                "optim.lr. The weights are those of the step before."
            )


def gradients(module: pl.LightningModule) -> dict[str, dict[str, Tensor]]:
    """The gradients of `module.model` by part and by the parameter's name within the part."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path, parameter in module.model.named_parameters():
        if parameter.grad is not None:
            part, _, name = path.replace("_orig_mod.", "").partition(".")
            parts[part][name or part] = parameter.grad
    return dict(parts)


def peak_rss() -> float:
    """The largest resident memory of this process so far, in GiB."""
    return peak_ram() / 2**30


def _logs_at(trainer: pl.Trainer, step: int) -> bool:
    """Whether Lightning logs the row of this optimizer step (they count from 1)."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0

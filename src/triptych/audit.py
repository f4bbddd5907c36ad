"""The training audit: what should train does, and what is frozen stays as it was."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from triptych.adapt import frozen_tensors
from triptych.types import TriptychError

GRACE = 3  # steps with a learning rate above 0 within which each gradient was non-zero once


class Audit(pl.Callback):
    """Stops a run whose parts do not train as its table says.

    After the first backward each trainable tensor has a finite gradient; within the first three
    steps with a learning rate above 0 it was non-zero at least once (a zero learning rate in
    warm-up is no fault; LoRA's A starts with a zero gradient, since B is 0). A part that starts
    behind a zero gate says so with `audit_grace`, the number of steps it may take.
    Frozen tensors are compared by checksum before and after.
    """

    def __init__(self) -> None:
        self._asleep: set[str] | None = None
        self._live_steps = 0
        self._sums: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sums = checksums(module.model)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any
    ) -> None:
        if self._asleep is not None and not self._asleep:
            return
        trained = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
        if self._asleep is None:
            missing = sorted(n for n, p in trained.items() if p.grad is None)
            if missing:
                raise TriptychError(
                    f"the audit found {len(missing)} trainable tensors without a gradient after "
                    f"the first backward, such as {', '.join(missing[:3])}; they are cut off by a "
                    "no_grad or detach, or never used: freeze them or mark them unused."
                )
            self._asleep = set(trained)
        self._asleep -= {n for n in self._asleep if bool(trained[n].grad.any())}
        self._live_steps += any(group["lr"] > 0 for group in optimizer.param_groups)
        late = sorted(n for n in self._asleep if self._live_steps >= _grace(module.model, n))
        if late:
            raise TriptychError(
                f"the audit found {len(late)} trainable tensors whose gradient was zero in each of "
                f"the first {self._live_steps} steps, such as {', '.join(late[:3])}; nothing "
                "reaches them: check the wiring, the labels and the images."
            )

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        after = checksums(module.model)
        changed = sorted(n for n, s in self._sums.items() if after.get(n) != s)
        if changed:
            raise TriptychError(
                f"the audit found {len(changed)} frozen tensors that training changed, such as "
                f"{', '.join(changed[:3])}."
            )


def checksums(model: torch.nn.Module) -> dict[str, int]:
    """A whole-number checksum of each frozen tensor: any changed bit changes it."""
    return {name: _checksum(tensor) for name, tensor in frozen_tensors(model)}


def _checksum(tensor: Tensor) -> int:
    if tensor.is_meta:
        return 0
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
    # two sums, the second weighted by position modulo a prime, so that swapped values show too
    place = torch.arange(len(data), device=data.device) % 65521 + 1
    return int(data.long().sum()) * 1_000_003 + int((data.long() * place).sum())


def _grace(model: torch.nn.Module, name: str) -> int:
    steps, path = GRACE, name
    while path:
        path = path.rpartition(".")[0]
        steps = max(steps, getattr(model.get_submodule(path), "audit_grace", 0))
    return steps

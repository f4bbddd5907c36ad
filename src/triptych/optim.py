"""Optimizer groups by part, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triptych.types import TriptychError


@dataclass
class Optim:
    """What conf/optim states: one optimizer, one schedule, and rates by part.

    parts: path -> {lr, weight_decay}; the longest path that a tensor's name starts with decides.
    warmup: steps if 1 or more, else the fraction of all steps. Biases, norms, scales and other
    tensors of fewer than two dimensions are never decayed.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.03
    warmup_from: float = 0.0  # learning rate at step 0, as a fraction of the peak
    schedule: str = "cosine"  # cosine | linear | constant
    final: float = 0.0  # learning rate at the last step, as a fraction of the peak
    clip: float | None = 1.0  # largest norm of all gradients
    lora_lr: float | None = None  # of adapters; null = lr
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def settings(self, name: str) -> dict[str, float]:
        """lr and weight decay of the tensor of this name, before the no-decay rule."""
        paths = [p for p in self.parts if name == p or name.startswith(p + ".")]
        chosen = self.parts[max(paths, key=len)] if paths else {}
        adapter = ".lora_" in name and self.lora_lr is not None
        lr = self.lora_lr if adapter else self.lr
        return {"lr": lr, "weight_decay": self.weight_decay, **chosen}

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Peak learning rate of every trainable tensor, by name."""
        return {n: self.settings(n)["lr"] for n, p in model.named_parameters() if p.requires_grad}

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the trainable tensors, grouped by rate, decay and part."""
        groups: dict[tuple, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            part = name.split(".")[0]
            setting = self.settings(name)
            if parameter.dim() < 2:
                setting["weight_decay"] = 0.0
            key = (part, *setting.values())
            group = groups.setdefault(key, {"params": [], "name": part, **setting})
            group["params"].append(parameter)
        if not groups:
            raise TriptychError(
                "nothing is trained: every row of the parts table is frozen; set a part to full or "
                "lora (model.trains.<part>=full, peft=lora)."
            )
        for group in groups.values():
            suffix = "" if group["weight_decay"] else "/no_decay"
            group["name"] = f"{group['name']}@{group['lr']:g}{suffix}"
        return self.optimizer(list(groups.values()))

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """Warm-up from `warmup_from`, then the schedule down to `final` over all steps."""
        warmup = int(self.warmup) if self.warmup >= 1 else int(self.warmup * steps)
        shapes = {"cosine": _cosine, "linear": _linear, "constant": _constant}
        if self.schedule not in shapes:
            raise TriptychError(
                f"optim.schedule is '{self.schedule}'; it takes {', '.join(shapes)}."
            )
        rate = partial(_rate, warmup=warmup, start=self.warmup_from, steps=steps, final=self.final)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(rate, shape=shapes[self.schedule])
        )


def _rate(
    step: int,
    warmup: int,
    start: float,
    steps: int,
    final: float,
    shape: Callable[[float], float],
) -> float:
    if step < warmup:
        return start + (1 - start) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * shape(done)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1 - done


def _constant(done: float) -> float:
    return 1.0


def trainable(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Name and tensor of all that is trained."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)

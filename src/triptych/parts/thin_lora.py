"""LoRA without passes over memory of its own: the thin products are added inside the wide ones.

peft computes base(x) + B(A(x)) * scale with a product, a scaling and a sum over the whole output.
Here the second thin product accumulates onto the base's output, and in the backward pass onto the
gradient of x. Same numbers up to rounding; a layer it does not fit runs peft's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


class ThinLinear(Linear):
    """A LoRA layer over a plain linear base, as `peft` builds it and saves it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or name not in self.lora_A or not self._fits(name, x):
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight  # (r,in), (out,r)
        base = self.base_layer
        return _Thin.apply(x, base.weight, base.bias, down, up, self.scaling[name])

    def _fits(self, name: str, x: Tensor) -> bool:
        dropout, base = self.lora_dropout[name], self.base_layer
        silent = isinstance(dropout, nn.Identity) or not dropout.training
        frozen = not base.weight.requires_grad and (
            base.bias is None or not base.bias.requires_grad
        )
        alike = x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype
        plain = name not in self.lora_variant and self.lora_B[name].bias is None
        ready = not (self.disable_adapters or self.merged)
        return (
            ready
            and plain
            and silent
            and frozen
            and alike
            and not x.is_meta  # a forecast stands in for autocast, which "meta" lacks
            and not torch.is_autocast_enabled(x.device.type)
        )


class _Thin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (...,in)
        weight: Tensor,  # (out,in)
        bias: Tensor | None,
        down: Tensor,  # (r,in)
        up: Tensor,  # (out,r)
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N,in)
        middle = flat @ down.T  # (N,r)
        out = F.linear(flat, weight, bias).addmm_(middle, up.T, alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, middle)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        flat, weight, down, up, middle = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N,out)
        back = (rows @ up).mul_(ctx.scale)  # (N,r)
        needs = ctx.needs_input_grad
        to_x = None
        if needs[0]:
            to_x = (rows @ weight).addmm_(back, down).view(*grad.shape[:-1], -1)
        to_down = back.T @ flat if needs[3] else None
        to_up = (rows.T @ middle).mul_(ctx.scale) if needs[4] else None
        return to_x, None, None, to_down, to_up, None


def thin(part: nn.Module) -> None:
    """Give the LoRA layers over plain linear bases of a part this forward."""
    for module in part.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = ThinLinear

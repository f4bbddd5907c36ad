"""Adapters and quantized weights back into plain linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace, in place, LoRA and quantized layers by float32 linear layers that do the same.

    Every adapter is merged into the base it was trained on: a quantized one is dequantized first
    (merging into few bits would round the adapter away).
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            plain = _merged(module)
        elif type(module).__name__ in QUANTIZED and not name.endswith(".base_layer"):
            plain = _linear(dequantized(module), module.bias)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def full_precision(model: nn.Module) -> nn.Module:
    """Compute in float32 everywhere, in place; quantized weights stay as they are."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float32
    return model.float()


def dequantized(layer: nn.Module) -> Tensor:
    """(out,in) float32 weights of a quantized linear layer."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float()


def _merged(layer: Any) -> nn.Module:
    base = layer.get_base_layer()
    if type(base).__name__ not in QUANTIZED:
        layer.merge(safe_merge=True)
        return base
    weight = dequantized(base)
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().float()
    return _linear(weight, base.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return made

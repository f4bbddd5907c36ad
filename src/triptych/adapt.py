"""Adapt a built model to its parts table: freeze, quantize, add LoRA; and print what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from triptych.models.base import Model
from triptych.table import PartsTable
from triptych.types import TriptychError

if TYPE_CHECKING:
    from peft import LoraConfig


BLOCK = 64  # weights that share a scale in 4-bit storage


@dataclass(frozen=True)
class Quantization:
    """How frozen linear layers are stored. roles: null = the language model, or LoRA's bases.

    compute_dtype "auto" follows the hardware: bf16 with units for it, else float32 (bf16 on a
    CPU without such units is an order of magnitude slower).
    """

    method: Literal["none", "int8", "nf4", "fp4"] = "none"
    double: bool = True  # quantize the scales of 4-bit blocks too (QLoRA, arXiv 2305.14314)
    compute_dtype: str = "auto"
    roles: tuple[str, ...] | None = None

    def targets(self, model: Model, table: PartsTable) -> list[str]:
        """The roles whose linear layers are quantized."""
        if self.method == "none":
            return []
        adapted = [p.split(".")[0] for p in table.roles("lora")]
        default = ["language"] if "language" in model.roles else adapted
        chosen = list(dict.fromkeys(self.roles if self.roles is not None else default))
        for role in chosen:
            if role in model.roles and table.state(role) == "full":
                raise TriptychError(
                    f"quantization={self.method} would store '{role}', which is trained in full, "
                    f"in few bits; use peft=qlora, or quantization=none."
                )
        return [role for role in chosen if role in model.roles]


def hardware_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The fast training dtype of this hardware: bfloat16 with units for it, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if amx else torch.float32


def adapt(
    model: Model, table: PartsTable, lora: LoraConfig | None, quantization: Quantization
) -> None:
    """Bring the model into the state its table asks for, in place.

    Order matters: bases are quantized first, adapters wrap them, gradients are set last. Modules
    that are already built are converted, so own, hub and GGUF weights take one road.
    """
    on_meta = any(p.is_meta for p in model.parameters())
    targets = quantization.targets(model, table)
    if not on_meta:
        for role in targets:
            quantize(getattr(model, role), quantization, skip=head_names(getattr(model, role)))
    for path in table.roles("lora"):
        if lora is None:
            raise TriptychError(
                f"'{path}' is 'lora' but peft.lora is not set; use peft=lora or peft=qlora."
            )
        add_lora(model, path, table, lora, quantized=path.split(".")[0] in targets and not on_meta)
    for name, parameter in model.named_parameters():
        state = "full" if _is_adapter(name) else table.state(name)
        floating = parameter.is_floating_point()
        parameter.requires_grad_(state == "full" and floating)
    _mark_frozen(model)
    for path in table.roles("ema"):
        for module in model.get_submodule(path).modules():
            module._triptych_slow = True  # changes without gradient, so it is saved and not audited
    model.train()


def quantize(part: nn.Module, how: Quantization, skip: set[str]) -> None:
    """Replace the linear layers of a part by 4-bit or 8-bit ones that hold the same weights.

    Layers whose input width is no multiple of BLOCK keep their precision in 4-bit parts: the CPU
    kernel of bitsandbytes 0.50 reads their blocks wrongly, with a quarter of the norm as error.
    """
    import bitsandbytes as bnb

    auto = hardware_dtype(next(part.parameters()).device)
    compute = auto if how.compute_dtype == "auto" else getattr(torch, how.compute_dtype)
    for name, linear in list(_linears(part)):
        if name in skip or (how.method != "int8" and linear.in_features % BLOCK):
            continue
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        data, device = linear.weight.data, linear.weight.device
        if how.method == "int8":
            new: nn.Module = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
        else:
            stored = {"quant_type": how.method, "compress_statistics": how.double}
            new = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute, **stored)
            new.weight = bnb.nn.Params4bit(data.contiguous(), requires_grad=False, **stored)
            # in eval the library would repack the weights in place for bf16 products on some CPUs
            new.support_avx512bf16_for_cpu = False
        new.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(parent), leaf, new.to(device))


def add_lora(model: Model, path: str, table: PartsTable, lora: LoraConfig, quantized: bool) -> None:
    """Wrap the linear layers of one part in LoRA, chosen by role and full name.

    lora.target_modules: null = every linear layer but the output head (every convolution of a
    tower that has no linear layer); else name endings.
    """
    from copy import copy

    from peft import inject_adapter_in_model

    from triptych.parts.thin_lora import thin

    part = model.get_submodule(path)
    wanted = lora.target_modules
    wanted = {wanted} if isinstance(wanted, str) else set(wanted or ())
    skip = head_names(part)
    names = [
        name
        for name in _adaptable(part)
        if name not in skip
        and table.state(f"{path}.{name}") == "lora"
        and (not wanted or name.split(".")[-1] in wanted or name in wanted)
    ]
    if not names:
        asked = f"named {', '.join(sorted(wanted))}" if wanted else "to adapt"
        raise TriptychError(
            f"LoRA on '{path}' found no layer {asked}; its layers end in "
            f"{', '.join(sorted({n.split('.')[-1] for n in _adaptable(part)})) or 'none'}."
        )
    part.is_loaded_in_4bit = quantized and _holds(part, "Linear4bit")
    part.is_loaded_in_8bit = quantized and _holds(part, "Linear8bitLt")
    part.base_model_prefix = getattr(part, "base_model_prefix", "")  # the library asks for it
    config = copy(lora)
    config.target_modules = set(names)
    inject_adapter_in_model(config, part)
    thin(part)


def head_names(part: nn.Module) -> set[str]:
    """Names of the output heads below a part: never quantized and never adapted by default."""
    head = getattr(part, "head", None)
    heads = {id(head)}
    if isinstance(head, nn.Linear):  # Idefics keeps the rows of added tokens below its head
        heads |= {id(module) for module in head.modules()}
    return {name for name, module in part.named_modules() if name and id(module) in heads}


def fingerprint(part: nn.Module) -> str:
    """Hash of a part's tensors and their names; equal weights give equal hashes anywhere."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(part.state_dict(keep_vars=True).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training must leave alone."""
    slow = slow_names(model)
    return ((n, p) for n, p in model.named_parameters() if not p.requires_grad and n not in slow)


def slow_names(model: nn.Module) -> set[str]:
    """Names of tensors and buffers of parts in state `ema`: they follow others by averaging."""
    owners = ((p, m) for p, m in model.named_modules() if getattr(m, "_triptych_slow", False))
    return {f"{path}.{name}" for path, m in owners for name in (*m._parameters, *m._buffers)}


def table_text(model: Model, table: PartsTable, rates: dict[str, float]) -> str:
    """The table a run prints first: parameters, trainable, dtype, learning rate, origin."""
    head = ("part", "state", "parameters", "trainable", "dtype", "lr", "from")
    lines: list[tuple[str, ...]] = [head]
    counted: dict[str, list[tuple[str, Tensor]]] = {row.path: [] for row in table.rows}
    for name, parameter in model.named_parameters():
        counted[table.row(name).path].append((name, parameter))
    for row in table.rows:
        tensors = [p for _, p in counted[row.path]]
        trained = sum(p.numel() for p in tensors if p.requires_grad)
        lr = sorted({rates[n] for n, _ in counted[row.path] if n in rates})
        lines.append(
            (
                row.path,
                row.state,
                f"{sum(numel(p) for p in tensors):,}",
                f"{trained:,}",
                ", ".join(sorted({_dtype_name(p) for p in tensors})),
                ", ".join(f"{rate:g}" for rate in lr),
                row.origin,
            )
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(numel(p) for p in model.parameters())
    lines.append(("total", "", f"{everything:,}", f"{trained:,}", "", "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    text.insert(1, "  ".join("-" * w for w in widths))
    text += [f"(not in this model, left out: {', '.join(table.skipped)})"] * bool(table.skipped)
    return "\n".join(text)


def numel(parameter: Tensor) -> int:
    """Weights a tensor stands for: a 4-bit tensor packs two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _linears(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in part.named_modules() if isinstance(m, nn.Linear))


def _adaptable(part: nn.Module) -> list[str]:
    """Layers LoRA can wrap: the linear ones, or the convolutions of a tower without any."""
    linear = [name for name, _ in _linears(part)]
    plain = (n for n, m in part.named_modules() if type(m) is nn.Conv2d and m.groups == 1)
    return linear or list(plain)


def _holds(part: nn.Module, kind: str) -> bool:
    return any(type(m).__name__ == kind for m in part.modules())


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _dtype_name(parameter: Tensor) -> str:
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _mark_frozen(model: nn.Module) -> None:
    """Flag the modules that `Model.train` keeps in eval: no tensor of their own part trains.

    A dropout of a trained part or adapter trains; one that only a frozen base owns does not.
    """
    for name, module in model.named_modules():
        inside_adapter = any(part.startswith("lora_") for part in name.split("."))
        own = list(module.parameters())
        module._triptych_frozen = not inside_adapter and not _trains(model, name, own)


def _trains(model: nn.Module, name: str, own: list[Tensor]) -> bool:
    """Whether a module, or for a tensorless one its nearest parent with base tensors, trains."""
    while True:
        module = model.get_submodule(name)
        base = [p for n, p in module.named_parameters() if not _is_adapter("." + n)]
        if base:
            return any(p.requires_grad for p in base)
        if not name:
            return any(p.requires_grad for p in own)
        name = name.rpartition(".")[0]

"""Run a model on "meta" and count the bytes it would hold, moment by moment.

Floating tensors have shapes only; integers and truth values (ids, slots, counts) are real and stay
on the CPU, so that code which looks at them (placeholders, supervised positions) runs as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
FACTORIES = (
    aten.full.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten._to_copy.default,
)
# what torch.autocast computes in few bits, and what it computes in float32
LOW = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__}
HIGH = {F.layer_norm, F.softmax, F.cross_entropy, F.normalize, torch.softmax, Tensor.softmax}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once; `bytes` now and `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: dict[int, int] = {}  # storage -> its bytes

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a tensor that is counted elsewhere (a weight)."""
        self._known[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in FACTORIES and _integers(args, kwargs) and _on_meta(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        elif any(_on_meta(t.device) for t in _tensors((args, kwargs))):
            if func in INDEXING:
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _freed(self, key: int) -> None:
        self.bytes -= self._known.pop(key, 0)


class Kernels(TorchFunctionMode):
    """Stands in for what "meta" lacks: fused attention, and autocast where `low` is a dtype."""

    def __init__(self, low: torch.dtype | None = None) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        attends = func is F.scaled_dot_product_attention
        if self.low is not None and (attends or func in LOW):
            args, kwargs = _cast((args, kwargs), torch.float32, self.low)
        elif self.low is not None and func in HIGH:
            args, kwargs = _cast((args, kwargs), self.low, torch.float32)
        if attends and any(_on_meta(t.device) for t in _tensors((args, kwargs))):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,  # (B,heads,T,D)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that keeps no (T,T) matrix, as the fused kernels of CPUs and GPUs."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(new) if t.dtype == old else t, tree)


def _integers(args: tuple, kwargs: dict) -> bool:
    """Whether a factory makes integers or truth values."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        first = _tensors(args)
        if first:
            return not first[0].is_meta and not first[0].is_floating_point()
        numbers = [a for a in args if isinstance(a, (int, float, bool))]
        return bool(numbers) and all(isinstance(a, int) for a in numbers)
    return not dtype.is_floating_point and not any(t.is_meta for t in _tensors(args))


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Truth values among indices as the positions where they hold."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found.extend(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found

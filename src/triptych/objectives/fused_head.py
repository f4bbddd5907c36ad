"""The head and its cross-entropy as one kernel where there is one: Liger's, on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, nn

SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping")


def fused_nll(model: nn.Module, states: Tensor, labels: Tensor) -> Tensor | None:
    """Sum of -log p(label) over (N,D) states, or None where the kernel is not to be had.

    It needs a GPU, the package `liger-kernel`, a plain linear head, and a decoder that neither
    scales nor caps its logits. The same loss as `chunked_nll`, which stands in everywhere else.
    """
    if not _on_gpu(states) or find_spec("liger_kernel") is None:
        return None
    language = getattr(model, "language", None)
    head, config = getattr(language, "head", None), getattr(language, "config", None)
    if type(head) is not nn.Linear or any(getattr(config, name, None) for name in SCALED):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss(head.weight, states.to(head.weight.dtype), labels, head.bias)


def _on_gpu(states: Tensor) -> bool:
    return states.is_cuda

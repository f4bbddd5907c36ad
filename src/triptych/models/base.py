"""What every wiring shares: roles, frozen parts that stay in eval, and the step hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from triptych.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROLES = ("vision", "connector", "language", "text", "fusion", "heads", "momentum")


class Model(nn.Module):
    """A wiring of parts. Its attribute names are the roles of the parts table."""

    official: PreTrainedConfig | None = None  # of the checkpoint that `from_hf` took it from

    @property
    def roles(self) -> list[str]:
        """The parts this model has that hold any tensor, in reading order."""
        parts = ((role, getattr(self, role, None)) for role in ROLES)
        return [r for r, p in parts if p is not None and any(True for _ in p.parameters())]

    @property
    def unused(self) -> list[str]:
        """Tensor name prefixes that this wiring never reaches."""
        return [
            f"{r}.{name}" for r in self.roles for name in getattr(getattr(self, r), "unused", ())
        ]

    def train(self, mode: bool = True) -> Model:
        """Frozen means eval: dropout and statistics of frozen tensors' modules stay off.

        A module trains when a tensor below it does. Modules that checkpoint activations follow
        `mode`, because the libraries test `self.training` there; so do dropouts of adapters.
        """
        super().train(mode)
        for module in self.modules():
            if mode and getattr(module, "_triptych_frozen", False):
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D) by the head of the part that writes."""
        return self.language.logits(hidden)

    def after_step(self, batch: Batch) -> None:
        """Called when the optimizer has stepped; momentum teachers and queues update here."""

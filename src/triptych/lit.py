"""LitVLM: the one LightningModule, a model with an objective and an optimizer."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from triptych.adapt import slow_names
from triptych.distributed import world
from triptych.models.base import Model
from triptych.objectives.base import Objective, shares
from triptych.optim import Optim
from triptych.types import Batch, TriptychError


class LitVLM(pl.LightningModule):
    """Trains any model with any objective; every sample weighs the same in an effective batch."""

    strict_loading = False  # checkpoints hold what is trained; `load_state_dict` checks the rest

    def __init__(self, model: Model, objective: Objective, optim: Optim) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optim = optim
        self._stepped = 0

    def setup(self, stage: str) -> None:
        self.objective.check(self.model, world())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Sum over terms of weight x sum / count of the whole effective batch.

        DDP averages over ranks and Lightning divides by the micro-batches of a window; the loss is
        multiplied by both, so that the gradient is the one of a single large batch.
        """
        self.objective.progress = self._progress(index)
        terms = self.objective(self.model, batch)
        scale = world() * self.trainer.accumulate_grad_batches
        loss = torch.zeros((), device=self.device)
        own = self.objective.counts(batch)
        for name, share in shares(terms, {**own, **batch.totals}).items():
            loss = loss + share * scale
            mean = terms[name].sum.detach() / max(1, own[name])
            self.log(f"train/{name}", mean, batch_size=max(1, own[name]))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.samples))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        if self.trainer.global_step > self._stepped:
            self._stepped = self.trainer.global_step
            self.model.after_step(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optim.build(self.model)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.optim.scheduler(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What training changed: trainable tensors and the buffers of parts that train."""
        state = super().state_dict(*args, **kwargs)
        kept = saved_names(self)
        return {name: value for name, value in state.items() if name in kept}

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, **kwargs: Any) -> Any:
        """Load a checkpoint; what it lacks must be exactly what is frozen."""
        kept = saved_names(self)
        missing, left = sorted(kept - state.keys()), sorted(state.keys() - kept)
        if missing or left:
            which = f"lacks {missing[0]}" if missing else f"holds {left[0]}, which is not trained"
            raise TriptychError(
                f"the checkpoint {which}; it belongs to a run with another parts table "
                "(same model, peft and model.trains are needed to continue)."
            )
        return super().load_state_dict(state, strict=False, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._stepped = checkpoint["global_step"]

    def _progress(self, index: int) -> float:
        batches = self.trainer.num_training_batches
        return self.current_epoch + index / batches if batches else float(self.current_epoch)


def saved_names(module: torch.nn.Module) -> set[str]:
    """Names a checkpoint must hold: tensors that train or follow, buffers of such modules."""
    slow = slow_names(module)
    trained = {n for n, p in module.named_parameters() if p.requires_grad or n in slow}
    modules = dict(module.named_modules())
    persistent = {
        name
        for name in _buffers(module)
        if name in slow or not getattr(modules[name.rpartition(".")[0]], "_triptych_frozen", False)
    }
    return trained | persistent


def _buffers(module: torch.nn.Module) -> set[str]:
    """Names of the buffers that a state dict holds."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name, value in part._buffers.items()
        if value is not None and name not in part._non_persistent_buffers_set
    }

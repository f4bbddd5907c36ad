"""Checkpoints that survive: written to the side, verified, renamed; the last two are kept."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from triptych.types import TriptychError

TERMINATED = 143  # exit code after SIGTERM: 128 + 15, so that a scheduler can tell and requeue


class Checkpoints(pl.Callback):
    """Saves every `minutes` or `steps`, and restores the random state on resume.

    A checkpoint is complete under its final name or not there at all. SIGTERM saves the step just
    done and ends the process with code 143.
    """

    def __init__(self, folder: Path, minutes: float = 5.0, steps: int | None = None) -> None:
        self.folder, self.minutes, self.steps = Path(folder), minutes, steps
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._random: dict[str, Any] | None = None
        self._terminate = False

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Behind training there is nothing to save: SIGTERM ends the process again."""
        signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
        if self._terminate:  # it came behind the last step
            raise SystemExit(TERMINATED)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._random is not None:
            restore_random(self._random)
            self._random = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return  # inside an accumulation window
        by_steps = self.steps is not None and step % self.steps == 0
        by_time = self.steps is None and time.monotonic() - self._saved_at > 60 * self.minutes
        if by_steps or by_time or self._terminate:
            # Lightning writes a step's metrics behind this hook: a process killed in between would
            # continue behind a row that nobody wrote. RunLogger drops the second writing.
            trainer._logger_connector.update_train_step_metrics()
            self.save(trainer)
        if self._terminate:
            print(f"SIGTERM: saved step {step}; continue with ckpt=last.", flush=True)
            raise SystemExit(TERMINATED)

    def save(self, trainer: pl.Trainer) -> Path:
        """Write, verify, rename; then drop all but the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        side = final.with_suffix(".writing")
        try:
            trainer.save_checkpoint(side, weights_only=False)
            torch.load(side, weights_only=True, map_location="cpu")
            with open(side, "rb") as file:
                os.fsync(file.fileno())
            side.rename(final)
        except OSError as error:
            side.unlink(missing_ok=True)
            kept = latest(self.folder)
            raise TriptychError(
                f"the checkpoint of step {trainer.global_step} could not be written to "
                f"{self.folder} ({error.strerror or error}); free space there and continue with "
                f"ckpt=last from {kept.name if kept else 'the start'}."
            ) from error
        for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
            old.unlink()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        return final

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count epochs as a run that was never stopped does.

        Lightning counts the starts of an epoch too, and behind two restarts at ends of epochs it
        takes the next one to be over: the data would go on an epoch too far.
        """
        done = trainer.current_epoch
        for count in ("total", "current"):
            checkpoint["loops"]["fit_loop"]["epoch_progress"][count].update(
                ready=done + 1, started=done + 1, processed=done, completed=done
            )

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random = state

    def _on_sigterm(self, *args: Any) -> None:
        self._terminate = True


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if any."""
    return max(Path(folder).glob("step-*.ckpt"), default=None)


def random_state() -> dict[str, Any]:
    """The state of every random generator, as plain types that `weights_only` loads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

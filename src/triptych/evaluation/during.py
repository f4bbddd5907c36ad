"""Score a small fixed slice while training, with the code of the final evaluation."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.runner import evaluate


class EvaluateSlice(pl.Callback):
    """Every `eval.every` steps: `eval.slice` questions of each benchmark, always the same."""

    def __init__(
        self, predictor: ModelPredictor, benchmarks: dict[str, Any], settings: Any
    ) -> None:
        self.predictor, self.benchmarks = predictor, benchmarks
        self.every, self.size = settings.every, settings.slice
        self._scored = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if not self.every or not self.benchmarks or step == self._scored or step % self.every:
            return
        self._scored = step
        images = self.predictor.processor.images
        cached, images.cached = images.cached, None  # the cache holds the training images
        results = evaluate(
            self.predictor, self.benchmarks, None, limit=self.size, blind="none", progress=False
        )
        images.cached = cached
        values = {f"slice/{k}": e["value"] for k, e in results["metrics"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        first, value = next(iter(values.items()))
        trainer.progress_bar_callback.print(f"step {step}: {first} {100 * value:.1f} %")

"""Score a small fixed slice while training, with the code of the final evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.runner import evaluate


class EvaluateSlice(pl.Callback):
    """Every `eval.every` steps: `eval.slice` questions of each benchmark, always the same.

    Each is asked again with the images permuted (unless eval.blind=none): as long as both scores
    are alike, the model does not look, whatever its loss.
    """

    def __init__(
        self, predictor: ModelPredictor, benchmarks: dict[str, Any], settings: Any
    ) -> None:
        self.predictor, self.benchmarks = predictor, benchmarks
        self.every, self.size = settings.every, settings.slice
        self.blind = "none" if settings.blind == "none" else "all"
        self._scored = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if not self.every or not self.benchmarks or step == self._scored or step % self.every:
            return
        self._scored = step
        with _without_cache(self.predictor.processor):
            results = evaluate(
                self.predictor,
                self.benchmarks,
                None,
                limit=self.size,
                blind=self.blind,
                progress=False,
            )
        values = {}
        for key, entry in results["metrics"].items():
            values[f"slice/{key}"] = entry["value"]
            if entry.get("blind") is not None:
                values[f"slice/{key}/blind"] = entry["blind"]
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        first, entry = next(iter(results["metrics"].items()))
        blind = entry.get("blind")
        beside = "" if blind is None else f", blind {100 * blind:.1f} %"
        said = f"step {step}: {first} {100 * entry['value']:.1f} %{beside}"
        trainer.progress_bar_callback.print(said)


@contextmanager
def _without_cache(processor: Any) -> Iterator[None]:
    """A cache of features holds the training images; what is asked here is encoded anew."""
    images = getattr(processor, "images", None)  # a library's own processor has none
    if not hasattr(images, "cached"):
        yield
        return
    cached, images.cached = images.cached, None
    try:
        yield
    finally:
        images.cached = cached

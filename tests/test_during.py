"""The slice that is scored while training: always the same, with a blind score beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_evaluation import Eyes, bench

from triptych.evaluation.during import EvaluateSlice


class Log:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, values: dict, step: int) -> None:
        self.rows.append((step, values))


def trained(callback: EvaluateSlice, steps: int) -> tuple[Log, list[str]]:
    log, said = Log(), []
    bar = SimpleNamespace(print=said.append)
    for step in range(1, steps + 1):
        trainer = SimpleNamespace(global_step=step, loggers=[log], progress_bar_callback=bar)
        for _ in range(2):  # micro-batches of a step
            callback.on_train_batch_end(trainer, None)
    return log, said


def looking(**settings: object) -> EvaluateSlice:
    eyes = Eyes()
    eyes.processor = SimpleNamespace(images=SimpleNamespace(cached="features"))
    chosen = SimpleNamespace(**{"every": 2, "slice": 9, "blind": "subset", **settings})
    return EvaluateSlice(eyes, {"toy": bench()}, chosen)


def test_a_model_that_looks_stands_above_its_blind_score():
    callback = looking()
    log, said = trained(callback, 5)
    assert [step for step, _ in log.rows] == [2, 4]  # once a step, however many micro-batches
    first, second = (values for _, values in log.rows)
    assert first == second and first["slice/toy/accuracy"] == 1.0
    assert first["slice/toy/accuracy/blind"] < 1.0
    assert said[0].startswith("step 2: toy/accuracy 100.0 %, blind ")
    assert callback.predictor.processor.images.cached == "features"


def test_without_a_blind_run_there_is_no_blind_score():
    log, said = trained(looking(blind="none"), 2)
    assert not any(key.endswith("/blind") for key in log.rows[0][1])
    assert said == ["step 2: toy/accuracy 100.0 %"]


def test_a_processor_without_a_cache_is_asked_as_it_is():
    callback = looking()
    callback.predictor.processor = object()
    assert trained(callback, 2)[0].rows


def test_the_cache_comes_back_when_the_model_fails(monkeypatch):
    callback = looking()
    monkeypatch.setattr(Eyes, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(callback, 2)
    assert callback.predictor.processor.images.cached == "features"


def test_training_goes_on_from_the_same_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trained(looking(), 4)
    assert torch.equal(torch.rand(3), expected)

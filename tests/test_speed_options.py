"""Micro-batches that fit, recomputed blocks, and kernels that stand in: options with one effect."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from triptych import micro_batch
from triptych.build import build_model, build_optim
from triptych.bundle import compose_preset
from triptych.data.datamodule import DataModule
from triptych.forecast import GIB
from triptych.micro_batch import split_to_fit, splits
from triptych.objectives import fused_head
from triptych.objectives.tokens import NextToken
from triptych.types import TriptychError


@pytest.fixture
def compose(tiny):
    """A function that composes the small preset over the tiny parts."""

    def make(*overrides: str):
        parts = [f"model.{role}.weights={tiny / role}" for role in ("vision", "language")]
        return compose_preset("llava", [*parts, *overrides])

    return make


@pytest.fixture
def data(vlm, dialogue):
    """A data module of twelve images, four rows a batch."""
    samples = [dialogue(("what color?", "red"), images=(i % 4,), name=f"s{i}") for i in range(12)]
    for number, sample in enumerate(samples):
        sample.cluster = str(number)
    return DataModule(samples, vlm.processor(), NextToken(), batch_size=4)


def trainer():
    return SimpleNamespace(precision="32-true", accumulate_grad_batches=1)


def test_a_batch_divides_into_equal_parts():
    assert splits(12) == [1, 2, 3, 4, 6, 12]


def test_a_batch_that_would_not_fit_is_split_and_the_step_stays(compose, data):
    cfg = compose("model.connector.shuffle=1")
    adapted = build_model(cfg, meta=True)
    whole, note = split_to_fit(cfg, adapted, trainer(), data)
    assert note == "" and data.batch_size == 4 and data.accumulate == 1
    cfg.memory.limit_gb = 0.999 * whole.peak / GIB
    watched = trainer()
    found, note = split_to_fit(cfg, build_model(cfg, meta=True), watched, data)
    assert found.peak < whole.peak and "make the same step" in note
    assert data.batch_size < 4 and data.batch_size * data.accumulate == 4
    assert watched.accumulate_grad_batches == data.accumulate


def test_freed_memory_is_handed_back_only_where_keeping_it_might_not_fit(
    compose, data, monkeypatch
):
    cfg = compose("model.connector.shuffle=1")
    found, _ = split_to_fit(cfg, build_model(cfg, meta=True), trainer(), data)
    handed = []
    monkeypatch.setattr(micro_batch, "return_memory", lambda: handed.append(True))
    assert micro_batch.spare_memory(found, 2.01 * found.peak / GIB) == "" and not handed
    said = micro_batch.spare_memory(found, 1.5 * found.peak / GIB)
    assert "handed back" in said and handed == [True]


def test_a_batch_whose_samples_are_compared_is_not_split(compose, data):
    cfg = compose("memory.limit_gb=0.000001", "model.connector.shuffle=1")
    data.objective.in_batch = True
    _, note = split_to_fit(cfg, build_model(cfg, meta=True), trainer(), data)
    assert data.batch_size == 4 and "objective.chunk" in note


def test_a_resumed_run_finds_its_place_in_batches_of_another_size(data):
    data.batch_size = 2
    data.load_state_dict({"epoch": 1, "batch": 3, "batch_size": 4})
    assert data._resume == (1, 6)


def test_blocks_are_computed_again_where_the_configuration_says(compose):
    plain = build_model(compose()).model
    again = build_model(compose("memory.checkpoint=[language]")).model
    assert again.language.model.is_gradient_checkpointing
    assert not plain.language.model.is_gradient_checkpointing
    with pytest.raises(TriptychError, match="memory.checkpoint names 'text'"):
        build_model(compose("memory.checkpoint=[text]"))


def test_the_8_bit_paged_optimizer_is_a_choice(compose):
    import bitsandbytes

    assert build_optim(compose("optim=paged8")).optimizer.func is bitsandbytes.optim.PagedAdamW8bit


def test_ligers_kernel_is_used_where_it_can_be(vlm, monkeypatch):
    states, labels = torch.randn(5, vlm.language.dim), torch.tensor([1, 2, 3, 4, 5])
    assert fused_head.fused_nll(vlm, states, labels) is None  # no GPU here

    class Loss:  # its interface: weight, states, labels, bias
        def __init__(self, reduction):
            assert reduction == "sum"

        def __call__(self, weight, states, labels, bias):
            logits = torch.nn.functional.linear(states, weight, bias)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    monkeypatch.setattr(fused_head, "find_spec", lambda name: object())
    monkeypatch.setattr(fused_head, "_on_gpu", lambda states: True)
    expected = torch.nn.functional.cross_entropy(vlm.logits(states), labels, reduction="sum")
    torch.testing.assert_close(fused_head.fused_nll(vlm, states, labels), expected)
    vlm.language.config.final_logit_softcapping = 30.0
    assert fused_head.fused_nll(vlm, states, labels) is None

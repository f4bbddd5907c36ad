"""The forecast against what real tensors take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch

from triptych.build import build_model, build_objective
from triptych.bundle import compose_preset
from triptych.cli import conf_dir
from triptych.config_check import check_overrides
from triptych.errors import ConfigError
from triptych.forecast import GIB, dry_run, forecast, fullest


@pytest.fixture
def compose(tiny):
    """A function that composes the small preset over the tiny parts."""

    def make(*overrides: str):
        parts = [f"model.{role}.weights={tiny / role}" for role in ("vision", "language")]
        return compose_preset("llava", [*parts, *overrides])

    return make


def meta(cfg, batch):
    return forecast(cfg, build_model(cfg, meta=True), batch, "32-true")


def test_the_full_size_preset_builds_without_weights():
    sizes = ["data.batch_size=1", "data.max_length=640", "trainer.accelerator=cpu"]
    found = dry_run(compose_preset("llava/7b", [*sizes, "quantization.method=none"]), [])
    assert found.image_tokens == 576 and found.problem == ""
    assert round(found.total.parameters / 1e9, 2) == 7.06
    moments = 2 * found.total.gradients  # Adam's, beside a counter for each tensor
    assert moments < found.total.optimizer < 1.001 * moments
    assert not found.fits(24) and "does NOT fit" in found.text(24)
    assert found.fits(found.peak / GIB + 1)


@pytest.mark.parametrize("peft", ["full", "lora", "connector"])
def test_activations_are_what_a_real_step_saves(compose, peft):
    cfg = compose(f"peft={peft}")
    model = build_model(cfg).model
    batch = fullest(model, rows=2, tokens=40)
    expected = meta(cfg, batch)
    assert expected.problem == ""
    batch.images.pixels = torch.zeros(batch.images.pixels.shape, dtype=torch.uint8)
    known = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        terms = build_objective(cfg, 1)(model, batch)
    real = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert terms and expected.activations == pytest.approx(real, rel=0.05)
    assert expected.peak > expected.activations + expected.total.weights


def test_stored_sizes_of_a_quantized_base(compose):
    cfg = compose("peft=qlora", "quantization.double=false", "peft.lora.r=16")
    model = build_model(cfg).model
    real = 0
    for parameter in model.language.parameters():
        real += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        real += 0 if state is None else state.absmax.nbytes
    found = meta(cfg, fullest(model, rows=1, tokens=30))
    language = next(p for p in found.parts if p.name == "language")
    assert language.weights == real
    whole = meta(compose("peft=lora"), fullest(model, rows=1, tokens=30))
    assert found.total.weights < whole.total.weights


def test_accumulation_keeps_gradients_during_the_forward_pass(compose):
    batch = fullest(build_model(compose(), meta=True).model, rows=1, tokens=30)
    once = meta(compose("peft=full"), batch)
    twice = meta(compose("peft=full", "trainer.accumulate_grad_batches=2"), batch)
    assert twice.peak > once.peak


def test_dry_run_is_a_word_or_a_node():
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words, cfg = check_overrides("train", ["dry_run=true", "dry_run.gpu_gb=24"])
        assert words[0] == "dry_run.enabled=true" and cfg.dry_run == {"enabled": True, "gpu_gb": 24}
        with pytest.raises(ConfigError, match="dry_run is true or false"):
            check_overrides("train", ["dry_run=3"])


STEP = """
import gc, sys, torch
from triptych.bundle import compose_preset
from triptych.build import build_model, build_objective, build_optim
from triptych.forecast import forecast, fullest
torch.set_num_threads(1)
config = ("{model_type: llama, vocab_size: 512, hidden_size: 256, intermediate_size: 768, "
          "num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 4}")
cfg = compose_preset("llava", [
    f"model.vision.weights={sys.argv[1]}/vision", "model.language.weights=null",
    f"+model.language.config={config}", "peft=full"])
def held(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(key))
objective = build_objective(cfg, 1)
meta = build_model(cfg, meta=True)
batch = fullest(meta.model, 16, 192)
found = forecast(cfg, meta, batch, "32-true")
gc.collect()
start = held("VmRSS")
model = build_model(cfg).model
optimizer = build_optim(cfg).build(model)
batch.images.pixels = torch.zeros(batch.images.pixels.shape, dtype=torch.uint8)
open("/proc/self/clear_refs", "w").write("5")
for _ in range(2):
    terms = objective(model, batch)
    sum(t.sum for t in terms.values()).backward()
    del terms
    optimizer.step()
    optimizer.zero_grad()
print(found.peak / (held("VmHWM") - start))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_the_peak_is_near_the_resident_memory(tiny):
    """glibc otherwise keeps freed blocks, which no forecast can know."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tiny)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout.split()[-1]) < 1.2

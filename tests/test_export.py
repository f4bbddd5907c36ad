"""Merged = adapter = reloaded, for LoRA and for adapters over a quantized base."""

from __future__ import annotations

import json

import pytest
import torch

import triptych
from triptych.build import build_model
from triptych.bundle import compose_preset, save_bundle
from triptych.interop.__main__ import main
from triptych.interop.export import export, outputs, probe
from triptych.types import TriptychError


@pytest.fixture
def make_run(tiny, tmp_path):
    """A function that leaves the bundle of a run whose adapters are far from zero."""

    def make(*overrides: str):
        parts = [f"model.{role}.weights={tiny / role}" for role in ("vision", "language")]
        cfg = compose_preset("llava", ["model/connector=mlp", *parts, *overrides])
        torch.manual_seed(0)
        adapted = build_model(cfg)
        with torch.no_grad():
            for parameter in adapted.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        run = tmp_path / "run"
        run.mkdir()
        save_bundle(run / "bundle", adapted, adapted.model.processor(), cfg, {})
        return run, adapted

    return make


@pytest.mark.parametrize("peft", ["lora", "qlora", "full"])
def test_a_run_is_exported_as_an_official_checkpoint(make_run, tmp_path, peft, capsys):
    from transformers import LlavaForConditionalGeneration

    run, adapted = make_run(f"peft={peft}")
    assert main(["export", f"run={run}", f"to={tmp_path / 'out'}"]) == 0
    assert "merged - adapter" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["format"] == "LlavaForConditionalGeneration"
    assert max(facts["differences"].values()) <= 1e-4 < 0.1 < facts["largest_output"]
    again = triptych.interop.from_hf(tmp_path / "out")
    assert not any(".lora_" in name for name, _ in again.named_parameters())
    batch = probe(adapted.model.processor(), seed=5)  # other inputs than export's own
    expected, found = outputs(adapted.model, batch)["logits"], outputs(again, batch)["logits"]
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=0, atol=1e-4)
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_the_original_base_is_an_option_and_its_gap_is_reported(make_run, tmp_path):
    run, adapted = make_run("peft=qlora")
    facts = export(run, tmp_path / "out", base="original")
    assert max(facts["differences"].values()) <= 1e-4 < facts["quantization_gap"]
    batch = probe(adapted.model.processor(), seed=5)
    expected = outputs(adapted.model, batch)["logits"]
    found = outputs(triptych.interop.from_hf(tmp_path / "out"), batch)["logits"]
    assert (found[:, : expected.shape[1]] - expected).abs().max() > 1e-4


def test_rounding_to_bfloat16_is_reported_apart(make_run, tmp_path):
    run, _ = make_run("peft=lora")
    facts = export(run, tmp_path / "out", dtype="bfloat16")
    assert max(facts["differences"].values()) <= 1e-4 < facts["rounding_gap"]


def test_a_family_without_official_format_becomes_a_bundle_without_adapters(make_run, tmp_path):
    run, adapted = make_run("peft=qlora", "model/connector=linear")
    facts = export(run, tmp_path / "out")
    assert facts["format"] == "bundle"
    loaded = triptych.load(tmp_path / "out")
    assert not any(".lora_" in name for name, _ in loaded.model.named_parameters())
    batch = probe(adapted.model.processor(), seed=5)
    torch.testing.assert_close(
        outputs(loaded.model, batch), outputs(adapted.model, batch), rtol=0, atol=1e-4
    )


def test_above_the_tolerance_nothing_is_written(make_run, tmp_path):
    run, _ = make_run("peft=lora")
    with pytest.raises(TriptychError, match="tolerance=0"):
        export(run, tmp_path / "out", tolerance=0.0)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.exporting").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export run=DIR to=DIR"),
        (["export", "run=x"], "to must be given"),
        (["export", "run=x", "to=y", "bse=original"], "did you mean 'base'"),
        (["export", "run=nowhere", "to=y"], "is no run"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(words, message, capsys):
    assert main(words) != 0
    assert message in capsys.readouterr().err

"""Presets of the contrastive families: sizes of the papers, on the meta device and offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triptych.apps.runs import find_results
from triptych.build import build_data, build_model, build_objective
from triptych.bundle import compose_preset
from triptych.data.processor import CaptionProcessor
from triptych.data.rows import RowSampler
from triptych.evaluation.records import runs_table
from triptych.forecast import fullest, step
from triptych.types import TriptychError

# totals of the official checkpoints' tensors
SIZES = {
    "clip/b32": 151_277_313,  # arXiv 2103.00020, table 20, and openai/clip-vit-base-patch32
    "clip/l14": 427_616_513,  # and openai/clip-vit-large-patch14
    "siglip/so400m": 877_960_274,  # google/siglip-so400m-patch14-384
    "align/base": 172_119_936,  # kakaobrain/align-base
}


@pytest.mark.parametrize("preset", SIZES)
def test_a_published_size_has_the_published_number_of_parameters(preset):
    adapted = build_model(compose_preset(preset), meta=True)
    total = sum(p.numel() for p in adapted.model.parameters())
    assert total == pytest.approx(SIZES[preset], rel=0.005)
    assert adapted.model.heads.dim == {"clip/b32": 512, "clip/l14": 768, "align/base": 640}.get(
        preset, 1152
    )


@pytest.mark.parametrize("preset", ["clip", "siglip", "align"])
@pytest.mark.parametrize("peft", ["family", "lora", "full", "connector"])
def test_every_family_takes_every_peft(preset, peft):
    cfg = compose_preset(preset, [f"peft={peft}"])
    adapted = build_model(cfg, meta=True)
    trained = {n.split(".")[0] for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained == ({"heads"} if peft == "connector" else {"vision", "text", "heads"})


def test_a_benchmark_is_written_for_every_family():
    cfg = compose_preset("clip")
    assert set(cfg.benchmark) == {"retrieval", "zero_shot", "relations"}


@pytest.mark.parametrize("family", ["clip", "siglip", "align", "llava"])
def test_one_command_gives_every_family_the_benchmark_of_the_data(family):
    cfg = compose_preset(family, ["data=easy_vqa"])
    assert list(cfg.benchmark) == ["easy_vqa"] and cfg.data.name == "easy_vqa"
    assert cfg.data.batch_size == (8 if family == "llava" else 128)
    own = compose_preset(family, ["data=captions", "data.path=pairs.jsonl"])
    assert not own.get("benchmark")
    chosen = compose_preset(family, ["data=easy_vqa", "benchmark=[zero_shot]", "data.batch_size=7"])
    assert list(chosen.benchmark) == ["zero_shot"] and chosen.data.batch_size == 7


def test_easy_vqa_never_holds_two_questions_of_an_image_in_a_batch_that_compares_pairs():
    cfg = compose_preset("clip", ["data=easy_vqa"])
    objective = build_objective(cfg, 1)
    data = build_data(cfg, object.__new__(CaptionProcessor), objective)
    clusters = data.reader.clusters
    for rows in list(RowSampler(data.plan, cfg.data.batch_size))[:20]:
        images = [clusters[i] for row in rows for i in row]
        assert len(images) == len(set(images)) > 120


@pytest.mark.parametrize("family", ["clip", "siglip", "align"])
def test_small_presets_run_in_chunks_and_on_ranks(family):
    cfg = compose_preset(family, ["data.train.size=6", "data.batch_size=6"])
    model = build_model(cfg).model
    model.train()
    data = build_data(cfg, model.processor(), build_objective(cfg, 1))
    batch = data.processor.rows(data.first_rows(6))
    gradients = []
    for chunk in (0, 4):
        cfg.objective.chunk = chunk
        objective = build_objective(cfg, 1)
        objective.check(model, ranks=2)
        model.zero_grad()
        objective(model, batch)["contrastive"].sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert "heads.logit_scale" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-7
        )


@pytest.mark.parametrize("family", ["clip", "siglip", "align"])
def test_the_memory_of_a_contrastive_step_is_forecast(family):
    cfg = compose_preset(family)
    model = build_model(cfg, meta=True).model
    kept, peak = step(model, build_objective(cfg, 1), fullest(model, 4, 20), None, False)
    assert 2**20 < kept < peak < 2**28


def test_training_from_nothing_says_how_to_use_chunks():
    cfg = compose_preset("clip", ["model/vision=tiny_scratch", "objective.chunk=4"])
    model = build_model(cfg).model
    with pytest.raises(TriptychError, match="model.vision.statistics=stored"):
        build_objective(cfg, 1).check(model, ranks=1)


@pytest.mark.slow
def test_a_sweep_over_both_kinds_of_model_ends_in_one_table(tmp_path):
    root = Path(__file__).parents[1]
    options = ["model=clip,llava", "data=easy_vqa", "trainer.max_steps=2", "eval.limit=60"]
    options.append(f"hydra.sweep.dir={tmp_path}")
    done = subprocess.run([sys.executable, root / "train.py", "-m", *options], cwd=tmp_path)
    assert done.returncode == 0
    results = find_results([tmp_path])
    entries = [r["metrics"]["easy_vqa/accuracy"] for r in results.values()]
    assert sorted(e["scorer"] for e in entries) == ["generate", "similarity"]
    assert all(e["prior"] is not None and e["blind"] is not None for e in entries)
    lines = runs_table(results).splitlines()
    assert sum(line.startswith("easy_vqa/accuracy  ") for line in lines) == 2

"""Stages through the trainer: BLIP-2's second in 4 bits, LLaVA's on small parts."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from triptych.cli import conf_dir
from triptych.run import train

SHORT = ["trainer.max_steps=2", "eval.limit=24", "eval.blind=none", "cache.features=false"]


def run(folder: Path, *options: str) -> Path:
    folder.mkdir()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"):
        cfg = hydra.compose("train", [*options, *SHORT])
    train(cfg, folder, options)
    return folder


@pytest.mark.slow
def test_stage_two_starts_from_stage_one_with_qlora(tmp_path, capsys):
    first = run(
        tmp_path / "one",
        "experiment=blip2/stage1",
        "data.batch_size=6",
        "benchmark.retrieval.samples.size=24",
        "benchmark.zero_shot.samples.size=24",
        "benchmark.relations.samples.size=24",
    )
    results = json.loads((first / "results.json").read_text())["metrics"]
    assert "retrieval/i2t_r1" in results and "relations/accuracy" in results
    capsys.readouterr()
    second = run(
        tmp_path / "two",
        "experiment=blip2/stage2",
        f"init_from={first}",
        "peft=qlora",
        "optim.lr=0",
        "data.batch_size=2",
    )
    said = capsys.readouterr().out
    one, two = (load_file(f / "bundle" / "weights.safetensors") for f in (first, second))
    shared = [n for n in two if n.startswith("connector.") and not n.startswith("connector.proj.")]
    assert {"connector.queries", "connector.norm.weight"} <= set(shared)
    assert all(torch.equal(two[n], one[n]) for n in shared)  # at rate 0 they stay what they were
    assert f"{len(shared)} tensors start from" in said
    adapters = [n for n in two if n.startswith("language.")]
    assert adapters and all(".lora_" in n for n in adapters)
    assert "nf4" in said
    metrics = json.loads((second / "results.json").read_text())["metrics"]
    assert metrics["easy_vqa/accuracy"]["n"] == 24


@pytest.mark.slow
def test_llavas_two_stages_run_on_small_parts(tmp_path, capsys):
    first = run(
        tmp_path / "one",
        "experiment=llava/align",
        "model=llava",
        "data=shapes_captions",
        "data.batch_size=6",
        "benchmark=none",
    )
    one = load_file(first / "bundle" / "weights.safetensors")
    assert one and all(n.startswith("connector.") for n in one)
    capsys.readouterr()
    second = run(
        tmp_path / "two",
        "experiment=llava/instruct",
        "model=llava",
        "data=easy_vqa",
        f"init_from={first}",
        "optim.lr=0",
        "data.batch_size=6",
    )
    assert f"{len(one)} tensors start from" in capsys.readouterr().out
    two = load_file(second / "bundle" / "weights.safetensors")
    assert all(torch.equal(two[n], one[n]) for n in one)  # at rate 0 they stay what they were
    assert {n.split(".")[0] for n in two} == {"connector", "language"}
    metrics = json.loads((second / "results.json").read_text())["metrics"]
    assert metrics["easy_vqa/accuracy"]["n"] == 24

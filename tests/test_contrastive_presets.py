"""Presets of the contrastive families: sizes of the papers, on the meta device and offline."""

from __future__ import annotations

import pytest

from triptych.build import build_model
from triptych.bundle import compose_preset

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
    cfg = compose_preset("clip", ["data=easy_vqa", "benchmark=[easy_vqa]"])
    assert cfg.benchmark.easy_vqa.samples.split == "test" and cfg.data.name == "easy_vqa"

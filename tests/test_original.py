"""MiniGPT-4 and the first Qwen-VL: every name and shape of their published layouts has a place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from triptych.build import build_model
from triptych.bundle import compose_preset
from triptych.interop.original import load_minigpt4, load_qwen_vl, per_head
from triptych.parts.patch_vit import POSITIONS, PatchVisionModel
from triptych.types import TriptychError

FIXTURES = Path(__file__).parent / "fixtures"
LOADERS = {"minigpt4": load_minigpt4, "qwen_vl": load_qwen_vl}


def published(family: str) -> dict[str, torch.Tensor]:
    """Tensors without storage under each name of the committed list."""
    tensors = {}
    listed = json.loads((FIXTURES / f"{family}_keys.json").read_text())["keys"]
    for pattern, shape in listed.items():
        places = re.search(r"\{(\d+):(\d+):(\d+)\}", pattern)
        numbers = range(*map(int, places.groups())) if places else [0]
        for number in numbers:
            name = pattern.replace(places.group(), str(number)) if places else pattern
            tensors[name] = torch.empty(shape, device="meta")
    return tensors


@pytest.mark.parametrize("family", LOADERS)
def test_the_published_layout_loads_strictly(family):
    model = build_model(compose_preset(f"{family}/7b"), meta=True).model
    state, load = published(family), LOADERS[family]
    load(model, state)
    first = next(n for n in state if n.endswith("ln_pre.weight") or n.endswith("ln_vision.weight"))
    with pytest.raises(TriptychError, match="lacks"):
        load(model, {n: t for n, t in state.items() if n != first})
    with pytest.raises(TriptychError, match="odd.weight"):
        load(model, state | {"odd.weight": torch.empty(1, device="meta")})
    name = "llama_proj.bias" if family == "minigpt4" else "lm_head.weight"
    with pytest.raises(TriptychError, match="other shapes"):
        load(model, state | {name: torch.empty(3, device="meta")})


def test_a_fused_projection_is_taken_apart_head_by_head():
    """As Qwen-VL's visual.py reads it: view as heads, then split each into three."""
    torch.manual_seed(0)
    heads, width = 2, 6
    weight, bias, x = torch.randn(3 * width, width), torch.randn(3 * width), torch.randn(4, width)
    mixed = torch.nn.functional.linear(x, weight, bias).view(4, heads, 3 * width // heads)
    expected = mixed.split(width // heads, dim=-1)
    ours = zip(per_head(weight, heads), per_head(bias, heads), strict=True)
    for (w, b), theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.nn.functional.linear(x, w, b), theirs.flatten(1))


def test_the_tower_reads_patches_alone_at_any_size():
    from transformers import CLIPVisionConfig

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
    )
    tower = PatchVisionModel(config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    expected = patches + tower.embeddings.position_embedding.weight  # 16 x 16 fits as it is
    torch.testing.assert_close(tower.embeddings(pixels), expected)
    assert patches.shape[1] == POSITIONS
    assert tower(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 64, 16)
    assert not [n for n, _ in tower.named_parameters() if "class" in n or "post" in n]

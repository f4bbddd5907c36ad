"""The parts table: what was asked for is what trains, for every family and every peft."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from triptych.adapt import Quantization, adapt, add_lora, fingerprint, numel, quantize, table_text
from triptych.build import build_model, parts_asked
from triptych.bundle import compose_preset
from triptych.cli import conf_dir
from triptych.table import merge
from triptych.types import TriptychError

FAMILIES = sorted(
    path.stem
    for path in (conf_dir() / "model").glob("*.yaml")
    if path.stem not in ("hf", "gpt4v")  # need a model id
)
PEFTS = ("family", "full", "connector", "lora", "qlora")


@pytest.mark.parametrize("family,peft", product(FAMILIES, PEFTS))
def test_every_family_with_every_peft_trains_what_its_table_says(family, peft):
    cfg = compose_preset(family, [f"peft={peft}"])
    adapted = build_model(cfg, meta=True)
    model, table = adapted.model, adapted.table
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        state = table.state(name)
        if not parameter.is_floating_point():
            continue
        expected = state == "full" or (state == "lora" and ".lora_" in name)
        assert (name in trains) == expected, (name, state)
    assert trains or not {"connector", "heads"} & set(model.roles)  # a bare decoder has no hinge
    if peft == "full":
        kept = {r.path for r in table.rows if r.state in ("frozen", "ema") and "." in r.path}
        roles = [r for r in table.rows if r.state == "frozen" and r.path not in kept]
        assert not roles
    if "lora" in peft:
        roles = {r.path.split(".")[0] for r in table.rows if r.state == "lora"}
        if "language" in model.roles:
            assert roles == {"language"}
            assert not [n for n in trains if ".lora_" in n and not n.startswith("language.")]
        else:
            assert roles and roles <= {"vision", "text", "connector"}
        assert not [n for n in trains if ".lora_" in n and "lm_head" in n]


def table(vlm, preset=None, asked=(), family=None):
    family = family or {"vision": "frozen", "connector": "full", "language": "full"}
    return merge(vlm, family, preset or {}, {}, asked, ("model=llava", "peft=lora"))


def test_the_preset_wins_and_each_row_says_where_it_came_from(vlm):
    rows = {r.path: (r.state, r.origin) for r in table(vlm, {"language": "lora"}).rows}
    assert rows["language"] == ("lora", "peft=lora")
    assert rows["connector"] == ("full", "model=llava")
    assert rows["vision.model.encoder.layers.2"] == ("unused", "wiring")


def test_a_preset_leaves_frozen_sub_rows_and_replaces_full_ones(vlm):
    family = {"vision": "frozen", "connector": "full", "language": "full"}
    family |= {"language.model.lm_head": "frozen", "language.model.model.norm": "full"}
    rows = {r.path: r.state for r in table(vlm, {"language": "lora"}, family=family).rows}
    assert rows["language.model.lm_head"] == "frozen" and "language.model.model.norm" not in rows


def test_a_part_the_model_lacks_is_an_error_only_when_asked(vlm):
    assert table(vlm, {"text": "lora"}).skipped == ["text"]
    with pytest.raises(TriptychError, match="'visoin'.*did you mean 'vision'"):
        table(vlm, {"visoin": "lora"}, asked=["visoin"])
    with pytest.raises(TriptychError, match="takes frozen, full"):
        table(vlm, {"vision": "forzen"})


def test_parts_are_read_off_the_command_line():
    overrides = ["model.trains.vision=full", "+peft.roles.text=lora", "seed=1"]
    assert parts_asked(overrides) == ["vision", "text"]


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, **options)


def test_lora_lands_in_the_named_role_alone(vlm):
    parts = table(vlm, {"language": "lora"})
    adapt(vlm, parts, lora(), Quantization())
    adapters = [n for n, _ in vlm.named_parameters() if "lora_" in n]
    assert adapters and all(n.startswith("language.model.model.layers") for n in adapters)
    blocks = {n.split("layers.")[1].split(".lora")[0] for n in adapters}
    assert len(blocks) == 2 * 7  # q, k, v, o, gate, up, down in both layers


def test_names_choose_the_layers_and_unknown_names_are_refused(vlm):
    parts = table(vlm, {"language": "lora"})
    with pytest.raises(TriptychError, match="named c_attn; its layers end in .*q_proj"):
        add_lora(vlm, "language", parts, lora(target_modules=["c_attn"]), quantized=False)
    add_lora(vlm, "language", parts, lora(target_modules=["q_proj"]), quantized=False)
    assert {n.split(".lora")[0][-6:] for n, _ in vlm.named_parameters() if "lora_" in n} == {
        "q_proj"
    }


@pytest.mark.parametrize("method,bound", [("nf4", 0.15), ("fp4", 0.2), ("int8", 0.02)])
def test_quantized_bases_stay_close_and_train_adapters_only(vlm, dialogue, method, bound):
    linear = vlm.language.model.model.layers[0].self_attn.q_proj
    states = torch.randn(5, 64)
    with torch.no_grad():
        before = linear(states)
    adapt(vlm, table(vlm, {"language": "lora"}), lora(), Quantization(method))
    kinds = {type(m).__name__ for m in vlm.language.modules()}
    assert ("Linear8bitLt" if method == "int8" else "Linear4bit") in kinds
    assert type(vlm.language.head) is torch.nn.Linear  # the head keeps its precision
    assert not [m for m in vlm.vision.modules() if "bit" in type(m).__name__]
    wrapped = vlm.language.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        after = wrapped(states)
    assert 0 < (after - before).norm() / before.norm() < bound
    weight = wrapped.base_layer.weight
    assert numel(weight) == 64 * 64
    vlm.train()
    vlm(vlm.processor().collate([dialogue(("what color?", "red"))])).sum().backward()
    assert vlm.connector.layers[0].weight.grad is not None and weight.grad is None


def test_widths_that_the_cpu_kernel_misreads_keep_their_precision():
    part = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 96))
    quantize(part, Quantization("nf4"), skip=set())
    assert [type(m).__name__ for m in part] == ["Linear", "Linear4bit"]


def test_quantized_weights_are_the_same_after_evaluation(vlm, dialogue):
    adapt(vlm, table(vlm, {"language": "lora"}), lora(), Quantization("nf4"))
    weight = vlm.language.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.detach().clone()
    vlm.eval()
    vlm.generate(vlm.processor().prompts([dialogue(("a", "b"), images=())]), max_new_tokens=2)
    assert torch.equal(before, weight)


def test_full_training_in_four_bits_is_refused(vlm):
    with pytest.raises(TriptychError, match="trained in full.*peft=qlora"):
        adapt(vlm, table(vlm), None, Quantization("nf4"))


def test_qlora_without_quantization_is_refused():
    cfg = compose_preset("llava", ["peft=qlora", "quantization=none"])
    with pytest.raises(TriptychError, match="peft=lora, or quantization=nf4"):
        build_model(cfg, meta=True)


def test_frozen_parts_stay_in_eval_and_adapters_train(vlm):
    adapt(vlm, table(vlm, {"language": "lora"}), lora(lora_dropout=0.1), Quantization())
    vlm.train()
    layer = vlm.language.model.model.layers[0]
    assert not vlm.vision.model.training and not layer.self_attn.training
    assert layer.self_attn.q_proj.lora_dropout["default"].training
    assert vlm.connector.training
    vlm.eval()
    assert not layer.self_attn.q_proj.lora_dropout["default"].training


def test_checkpointing_runs_below_a_frozen_language_model(vlm, dialogue):
    """Layers that checkpoint stay in train mode; their forward runs again in the backward."""
    family = {"vision": "frozen", "connector": "full", "language": "frozen"}
    adapt(vlm, table(vlm, family=family), None, Quantization())
    vlm.language.model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm.train()
    runs = []
    for layer in vlm.language.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *a: runs.append(1))
    batch = vlm.processor().collate([dialogue(("what color?", "red"))])
    loss = vlm(batch).square().mean()
    assert len(runs) == 2
    loss.backward()
    assert len(runs) == 4  # both layers were computed again
    assert vlm.connector.layers[0].weight.grad.abs().sum() > 0


def test_fingerprints_change_with_one_byte(vlm):
    before = fingerprint(vlm.vision)
    with torch.no_grad():
        vlm.vision.model.pre_layrnorm.bias[0] += 1e-6
    assert fingerprint(vlm.vision) != before and fingerprint(vlm.language) != before


def test_the_table_prints_every_part(vlm):
    parts = table(vlm, {"language": "lora"})
    adapt(vlm, parts, lora(), Quantization("nf4"))
    text = table_text(vlm, parts, {"connector.layers.0.weight": 1e-3})
    row = next(line for line in text.splitlines() if line.startswith("connector"))
    assert "0.001" in row and "model=llava" in row
    assert "nf4" in text and "total" in text


def test_llava_7b_builds_without_memory_or_network():
    adapted = build_model(compose_preset("llava/7b"), meta=True)
    total = sum(p.numel() for p in adapted.model.parameters())
    assert round(total / 1e9, 2) == 7.06
    assert adapted.model.placeholders(336, 336) == 576
    assert all(p.is_meta for p in adapted.model.parameters())
    small = build_model(compose_preset("llava/7b", ["model/vision=siglip_so400m"]), meta=True)
    assert small.model.placeholders(384, 384) == 729

"""The presets of the families: small ones learn in every part they train, full ones have the
published sizes, and each experiment freezes what its paper freezes."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest
import torch

from triptych.build import build_model, build_objective, build_optim
from triptych.bundle import compose_preset
from triptych.cli import conf_dir
from triptych.data.templates import IMAGE_MARK, render
from triptych.parts.pretrained import resolve
from triptych.types import Sample, assistant

SMALL = (
    "blip",
    "oscar",
    "blip2",
    "blip2_stage1",
    "flamingo",
    "minigpt4",
    "instructblip",
    "qwen_vl",
)
FROZEN = {  # what of each family trains (families.md); the rest is frozen
    "blip": {"vision", "connector", "heads"},
    "oscar": {"connector", "language"},
    "blip2": {"connector"},
    "blip2_stage1": {"connector", "heads"},
    "flamingo": {"connector", "fusion"},
    "minigpt4": {"connector"},
    "instructblip": {"connector"},
    "qwen_vl": {"connector", "language"},
}
LOOK = {"role": "user", "content": [{"type": "image"}]}


def tiny_parts(cfg, tiny: Path) -> None:
    """Point a small preset's parts at the random ones of the tests."""
    vision = cfg.model.vision.get("tower") or cfg.model.vision
    vision.weights = str(tiny / "vision")
    language = cfg.model.get("language")
    if language is not None:
        own = "weights" if "weights" in language else "tokenizer"
        language[own] = str(tiny / "language")
    connector = cfg.model.connector
    if "weights" in connector:
        connector.weights = None  # made for the shipped tower
    for node in (connector, connector.get("reader") or {}):
        if "tokenizer" in node:
            node["tokenizer"] = str(tiny / "language")


@pytest.mark.parametrize("name", SMALL)
def test_small_presets_train_what_the_family_trains(name, tiny, dialogue, pictures):
    torch.manual_seed(0)
    cfg = compose_preset(name)
    tiny_parts(cfg, tiny)
    adapted = build_model(cfg)
    trained = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == FROZEN[name]
    objective = build_objective(cfg, 1)
    if cfg.data.train.get("kind") == "captions":
        samples = [
            Sample([LOOK, assistant(w)], [pictures[i]], tags=[w], id=w)
            for i, w in enumerate(("red circle", "blue square"))
        ]
    else:
        samples = [
            dialogue((q, "red"), images=(i,), name=q) for i, q in enumerate(("what?", "is it?"))
        ]
    batch = adapted.model.processor().rows([[s] for s in samples])
    terms = objective(adapted.model, batch)
    assert set(terms) == set(objective.counts(batch))
    sum(t.sum for t in terms.values()).backward()
    gated = name == "flamingo"  # all but the gates waits for the gates to open
    for n in trained:
        gradient = adapted.model.get_parameter(n).grad
        assert gradient is not None, n
        assert gradient.any() or gated or "key.bias" in n or "k_proj.bias" in n, n
    answers = adapted.model.eval().generate(adapted.model.processor().prompts(samples))
    assert len(adapted.model.processor().decode(answers)) == 2


SIZES = {  # preset -> (parameters in millions, part or None for all), with the paper's number
    "blip2_stage1/eva_g": (188, "connector"),  # arXiv 2301.12597, section 3.1
    "instructblip/7b": (7_900, None),  # the checkpoint's name card
    "qwen_vl/7b": (9_600, None),  # arXiv 2308.12966, table 1
    "minigpt4/7b": (3.15, "connector.proj"),  # 768 x 4096 + 4096
    "minigpt4/13b": (3.94, "connector.proj"),  # 768 x 5120 + 5120
    # arXiv 2204.14198, table 1: 1.2 B in the gated layers of 3B, whose tower is 1,536 wide and not
    # CLIP's 1,024; 24 x (2048 x (2 x 2048 + 2 x 1024) + 8 x 2048 x 2048)
    "flamingo/3b": (1_107.4, "fusion"),
    "oscar/base": (111.6, None),  # BERT-base with its head, and 2,054 x 768
    "blip/base": (86, "vision"),
    "blip2/opt2.7b": (2_700, "language"),
    "blip2/flant5xxl": (11_100, "language"),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_presets_have_the_published_size(name):
    millions, part = SIZES[name]
    extra = ["model.vision.folder=regions"] if name == "oscar/base" else []
    model = build_model(compose_preset(name, extra), meta=True).model
    module = model.get_submodule(part) if part else model
    found = sum(p.numel() for p in module.parameters()) / 1e6
    assert abs(found / millions - 1) < 0.03, f"{name}: {found:,.1f} M, stated {millions:,} M"


def test_minigpt4_at_full_size_trains_one_weight_and_one_bias():
    model = build_model(compose_preset("minigpt4/7b"), meta=True).model
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector.proj.weight": (4096, 768), "connector.proj.bias": (4096,)}


STAGES = {
    "blip2/stage1": {"connector", "heads"},
    "blip2/stage2": {"connector"},
    "blip2/stage1_paper": {"connector", "heads"},
    "blip2/stage2_paper": {"connector"},
    "blip/pretrain": {"vision", "connector", "heads"},
    "blip/vqa": {"connector"},
    "oscar/pretrain": {"connector", "language", "heads"},
    "oscar/tags": {"connector", "language", "heads"},
    "flamingo/pretrain": {"connector", "fusion"},
    "llava/align": {"connector"},
    "llava/instruct": {"connector", "language"},
    "minigpt4/stage1": {"connector.proj"},
    "minigpt4/stage2": {"connector.proj"},
    "instructblip/tune": {"connector"},
    "qwen_vl/stage1": {"vision", "connector"},
    "qwen_vl/stage2": {"vision", "connector", "language"},
    "qwen_vl/stage3": {"connector", "language"},
}


def compose_experiment(name: str, *options: str):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [f"experiment={name}", *options])


def test_each_experiment_of_these_families_is_listed_above():
    families = (
        "blip",
        "blip2",
        "oscar",
        "flamingo",
        "llava",
        "minigpt4",
        "instructblip",
        "qwen_vl",
    )
    folder = conf_dir() / "experiment"
    found = {f"{f}/{p.stem}" for f in families for p in (folder / f).glob("*.yaml")}
    assert found == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_experiments_freeze_what_the_paper_freezes(name):
    cfg = compose_experiment(name)
    trains = {path for path, state in cfg.model.trains.items() if state == "full"}
    assert trains == STAGES[name]


def test_llava_trains_the_projector_and_then_the_language_model_too():
    projector = {f"connector.layers.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")}
    for stage, parts in (("align", {"connector"}), ("instruct", {"connector", "language"})):
        cfg = compose_experiment(f"llava/{stage}", "model.language.config.num_hidden_layers=1")
        model = build_model(cfg, meta=True).model
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n.split(".")[0] for n in trained} == parts
        assert {n for n in trained if n.startswith("connector.")} == projector
        language = {n for n, _ in model.named_parameters() if n.startswith("language.")}
        assert {n for n in trained if n.startswith("language.")} in (language, set())
        assert model.placeholders(336, 336) == 576


def test_llava_with_adapters_trains_all_of_the_projector_at_its_own_rate():
    cfg = compose_experiment(
        "llava/instruct", "peft=lora", "model.language.config.num_hidden_layers=1"
    )
    model = build_model(cfg, meta=True).model
    rates = build_optim(cfg).rates(model)
    adapters = {n for n in rates if ".lora_" in n}
    assert {rates[n] for n in adapters} == {2e-4}
    assert {rates[n] for n in rates.keys() - adapters} == {2e-5}
    assert all(n.startswith("connector.") for n in rates.keys() - adapters)
    ranks = {model.get_parameter(n).shape[0] for n in adapters if "lora_A" in n}
    assert ranks == {128}


def test_llavas_first_prompt_is_the_image_and_its_caption(tokenizer, dialogue):
    plain = copy(tokenizer)
    plain.chat_template = Path(resolve("assets/templates/plain.jinja")).read_text(encoding="utf-8")
    sample = dialogue(("describe the image.", "a red circle"))
    text, ((start, end),) = render(sample.messages, plain)
    assert text == IMAGE_MARK + "a red circle\n"
    assert text[start:end] == "a red circle\n"


def test_qwen_vl_gives_256_tokens_at_both_of_its_sizes():
    for stage, side in (("qwen_vl/stage1", 224), ("qwen_vl/stage2", 448)):
        model = build_model(compose_experiment(stage), meta=True).model
        assert model.vision.transform.size == (side, side)
        assert model.placeholders(side, side) == 256


def test_qwen_vl_adapters_sit_in_the_language_model_alone():
    from triptych.adapt import head_names

    cfg = compose_preset("qwen_vl/7b", ["peft=lora"])
    model = build_model(cfg, meta=True).model
    adapted = {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert adapted and all(n.startswith("language.") for n in adapted)
    assert not any(h in n for n in adapted for h in head_names(model.language))

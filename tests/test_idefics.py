"""Idefics 1 to 3 by `model=hf`: the library's own processor, loss, parts by role, answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_hosted
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_hosted import (  # noqa: F401
    adapted,
    assert_same_gradients,
    mean_loss,
    options,
    questions,
    supervised,
)

from triptych import run
from triptych.api import load
from triptych.bundle import compose_preset
from triptych.data.hosted_processor import HostedProcessor
from triptych.data.idefics import Idefics, expand
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.interop import from_hf
from triptych.models.hosted import HostedVLM
from triptych.types import IGNORE, TriptychError

NAMES = ("idefics", "idefics2", "idefics3")
TEMPLATES = {"idefics": "assets/templates/idefics.jinja"}  # the first brings none


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("idefics")
    for name in NAMES:
        torch.manual_seed(0)
        getattr(tiny_hosted, name)(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, HostedVLM]:
    """Untouched models, for tests that change none of their tensors."""
    return {n: HostedVLM(str(f), template=TEMPLATES.get(n)).eval() for n, f in folders.items()}


@pytest.fixture
def dialogues(dialogue):
    """One image, several turns with two images, and none."""
    return [
        dialogue(("what color is the shape?", "red"), images=(0,), name="a"),
        dialogue(("is there a circle?", "no, a yellow triangle"), images=(1,), name="b"),
        dialogue(("what color?", "blue"), ("a circle?", "no"), images=(0, 1), name="c"),
        dialogue(("is it red?", "yes"), images=(), name="d"),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_marks_in_a_text_give_what_the_librarys_lists_give(models, pictures, side):
    wrapped = models["idefics"].processor().library
    assert isinstance(wrapped, Idefics)
    one, two, three = (ref.open() for ref in pictures[:3])
    lists = [["User:", one, two, "what?"], ["Is it red?"], ["A", three, "b"]]
    texts = ["User:<image><image>what?", "Is it red?", "A<image>b"]
    wrapped.tokenizer.padding_side = side
    theirs = wrapped.library(text=lists, return_tensors="pt")
    ours = wrapped(text=texts, images=[[one, two], [], [three]], padding_side=side)
    assert {"pixel_values", "image_attention_mask", "input_ids"} <= theirs.keys() <= ours.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    alone = wrapped(text=texts[1:2])
    assert not alone["image_attention_mask"].any() and not alone["pixel_values"].any()


def test_marks_side_by_side_share_a_token_and_spans_follow():
    text, replaced = expand("a<image><image>b", "[i]", lambda c: f"({c})")
    fake = "<fake_token_around_image>"
    assert text == f"a{fake}[i](<)[i](b)b"
    assert [text[slice(*r["new_span"])] for r in replaced] == [f"{fake}[i](<)", "[i](b)"]
    assert ["a<image><image>b"[slice(*r["span"])] for r in replaced] == ["<image>"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_assistants_words_are_learned_and_nothing_else(models, dialogues, name):
    processor = models[name].processor()
    said = [["red"], ["no, a yellow triangle"], ["blue", "no"], ["yes"]]
    expected = ["".join(f" {words}<end_of_utterance>" for words in row) for row in said]
    assert supervised(processor, processor.collate(dialogues)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_classs_logits(models, dialogues, name):
    """The class's own `labels` fail for Idefics, whose loss does not know the added tokens."""
    model = models[name]
    batch = model.processor().collate(dialogues)
    labels = batch.text["language"].labels
    logits = model.library(**model.inputs(batch)).logits[:, :-1]
    theirs = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    ours = mean_loss(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, ours, theirs)


def test_idefics_looks_through_its_connector(models):
    """The gated layers and the resampler are what Flamingo trains."""
    model = models["idefics"]
    names = {n.split(".")[0] for n, _ in model.connector.named_parameters()}
    assert names == {"perceiver_resampler", "gated_cross_attn_layers"}
    held = [id(p) for r in model.roles for p in getattr(model, r).parameters()]
    assert len(held) == len(set(held)) == len(list(model.library.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_over_four_bits_run_inside_the_library(folders, dialogues, name):
    model = adapted(
        folders[name], {"vision": "frozen", "connector": "full", "language": "lora"}, "nf4"
    )
    model.template = TEMPLATES.get(name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapters = {n for n in trained if "lora_" in n}
    assert adapters and all(n.startswith("language.") for n in adapters)
    assert {n.split(".")[0] for n in trained - adapters} == {"connector"}
    assert not any("lm_head" in n for n in adapters)
    inside = [n for n, m in model.library.named_modules() if type(m).__name__ == "Linear4bit"]
    assert inside and not any("lm_head" in n or "vision" in n for n in inside)
    mean_loss(model, model.processor().collate(dialogues)).backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {n for n in trained if "lora_A" not in n}  # B starts at zero


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_likelihoods_do_not_depend_on_the_batch(models, dialogues, name):
    model = models[name]
    one, many = (ModelPredictor(model, model.processor(), size) for size in (1, 8))
    answers = one.generate(dialogues, max_new_tokens=4)
    assert many.generate(dialogues, max_new_tokens=4) == answers
    assert len(set(answers)) > 1
    candidates = [["red", "a blue circle"]] * len(dialogues)
    alone, together = (p.loglikelihood(dialogues, candidates) for p in (one, many))
    for row, other in zip(alone, together, strict=True):
        assert [s.sum for s in row] == pytest.approx([s.sum for s in other], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_changes_no_answer_and_the_turns_end_stops_it(models, dialogues, name):
    model = models[name]
    batch = model.processor().prompts(dialogues[:1])
    cached = model.generate(batch, max_new_tokens=4)
    assert torch.equal(cached, model.generate(batch, max_new_tokens=4, use_cache=False))
    end = model.processor().tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert end in model._ends()["eos_token_id"]


@pytest.mark.parametrize("name", NAMES)
def test_from_hf_names_the_road(folders, name):
    with pytest.raises(TriptychError, match=f"{name}.*model=hf model.id=") as told:
        from_hf(folders[name])
    assert "\n" not in str(told.value)


def test_without_a_template_the_option_is_named(folders, dialogues):
    processor = HostedProcessor.of(str(folders["idefics"]), None, None)
    with pytest.raises(TriptychError, match="no chat template.*model.template"):
        processor.collate(dialogues)


@pytest.mark.slow
def test_a_run_trains_what_flamingo_trains(folders, questions, pictures, tmp_path):  # noqa: F811
    template = f"model.template={TEMPLATES['idefics']}"
    trains = "model.trains={vision: frozen, connector: full, language: frozen}"
    cfg = compose_preset(f"hf:{folders['idefics']}", [*options(questions), template, trains])
    run.train(cfg, tmp_path)
    trained = load_file(tmp_path / "bundle/weights.safetensors")
    assert trained and all(n.startswith("connector.") for n in trained)
    used = load(tmp_path)
    tensors = dict(used.model.named_parameters())
    assert all(torch.equal(tensors[n], t) for n, t in trained.items())
    assert isinstance(used.answer(pictures[0].open(), "what color?", max_new_tokens=3), str)

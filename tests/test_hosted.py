"""Library models by id: their own loss, masks from their templates, parts by role, one trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_hosted
import torch

from triptych.adapt import Quantization, adapt
from triptych.api import load
from triptych.bundle import compose_preset
from triptych.data.hosted_processor import HostedProcessor
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.interop.hosted_roles import find_roles
from triptych.models.hosted import HostedVLM
from triptych.objectives.tokens import NextToken
from triptych.table import merge
from triptych.types import IGNORE, DataError, Images, Sample, Tokens, TriptychError, assistant, user
from triptych.types import Batch as BatchType

NAMES = list(tiny_hosted.BUILDERS)
TRAINS = {"vision": "frozen", "connector": "full", "language": "lora"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    return tiny_hosted.build_all(tmp_path_factory.mktemp("hosted"))


@pytest.fixture(scope="session")
def models(folders) -> dict[str, HostedVLM]:
    """Untouched models, for tests that change none of their tensors."""
    return {name: HostedVLM(str(folder)).eval() for name, folder in folders.items()}


@pytest.fixture
def samples(dialogue):
    """What each of the three formats takes: one image, one question, answers of uneven length."""
    return [
        dialogue(("what color is the shape?", "red"), images=(0,), name="a"),
        dialogue(("is there a circle?", "no, a yellow triangle"), images=(1,), name="b"),
        dialogue(("what color?", "blue"), images=(2,), name="c"),
    ]


@pytest.fixture
def dialogues(dialogue, samples):
    """What models with a chat template also take: several turns, several images, none."""
    return [
        *samples,
        dialogue(("what color?", "red"), ("a circle?", "no"), images=(0, 1), name="d"),
        dialogue(("is it red?", "yes"), images=(), name="e"),
    ]


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1)


def adapted(folder: Path, trains: dict[str, str], method: str = "none") -> HostedVLM:
    torch.manual_seed(0)
    model = HostedVLM(str(folder))
    table = merge(model, trains, {}, {})
    adapt(model, table, lora(), Quantization(method, compute_dtype="float32"))
    return model


def mean_loss(model: HostedVLM, batch: BatchType) -> torch.Tensor:
    objective = NextToken(chunk=4)
    return objective(model, batch)["next_token"].sum / objective.counts(batch)["next_token"]


def supervised(processor: HostedProcessor, batch: BatchType) -> list[str]:
    labels = batch.text["language"].labels
    return [processor.tokenizer.decode(row[row != IGNORE]) for row in labels]


def assert_same_gradients(model, ours, theirs):
    """Two losses of a model move each of its trainable tensors alike, or both leave it alone."""
    weights = [p for p in model.parameters() if p.requires_grad]
    mine, own = (torch.autograd.grad(x, weights, allow_unused=True) for x in (ours, theirs))
    for one, other in zip(mine, own, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_its_gradients_are_the_classs_own(models, samples, dialogues, name):
    model = models[name]
    batch = model.processor().collate(samples if name == "paligemma" else dialogues)
    tokens = batch.text["language"]
    theirs = model.library(**model.inputs(batch), labels=tokens.labels).loss
    ours = mean_loss(model, batch)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(model, ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_one_role(models, name):
    model = models[name]
    ours = {id(p) for p in model.parameters()}
    assert ours == {id(p) for p in model.library.parameters()}
    assert model.roles == ["vision", "connector", "language"]
    held = [id(p) for r in model.roles for p in getattr(model, r).parameters()]
    assert len(held) == len(set(held))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_a_template_without_marks_gives_the_assistants_words(models, dialogues, name):
    processor = models[name].processor()
    stop, space = processor.tokenizer.eos_token, " " if name == "smolvlm" else ""
    said = [["red"], ["no, a yellow triangle"], ["blue"], ["red", "no"], ["yes"]]
    expected = ["".join(f"{space}{words}{stop}" for words in row) for row in said]
    assert supervised(processor, processor.collate(dialogues)) == expected


def test_marks_in_a_template_decide_the_mask(folders, dialogues):
    """Marks around the words and not the stop token: then the stop token carries no loss."""
    marked = tiny_hosted.QWEN_TEMPLATE.replace(
        "{{ c.text }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ c.text }}{% endgeneration %}"
        "{% else %}{{ c.text }}{% endif %}",
    )
    processor = HostedProcessor.of(str(folders["qwen2_5_vl"]), None, marked)
    batch = processor.collate(dialogues)
    expected = ["red", "no, a yellow triangle", "blue", "redno", "yes"]
    assert supervised(processor, batch) == expected


def test_prefix_models_learn_the_answer_and_nothing_else(models, samples, dialogue):
    processor = models["paligemma"].processor()
    batch = processor.collate(samples)
    assert supervised(processor, batch) == ["red<eos>", "no, a yellow triangle<eos>", "blue<eos>"]
    labels = batch.text["language"].labels
    assert (batch.images.extra["token_type_ids"] == (labels != IGNORE)).all()
    turns = dialogue(("what?", "red"), ("and?", "blue"), name="two turns")
    with pytest.raises(DataError, match="'two turns' has 4 turns.*one question"):
        processor.collate([turns])


def test_an_answer_does_not_see_its_own_future(models, samples):
    """The prefix is bidirectional; a change of the last answer token reaches no earlier one."""
    for model in models.values():
        batch = model.processor().collate(samples[1:2])
        tokens = batch.text["language"]
        last = int((tokens.labels[0] != IGNORE).nonzero()[-1])
        with torch.no_grad():
            before = model(batch)
            tokens.ids[0, last] = 7
            after = model(batch)
        torch.testing.assert_close(before[0, :last], after[0, :last])
        assert not torch.allclose(before[0, last], after[0, last])


def test_templates_that_cannot_be_followed_are_refused_by_name(folders, dialogue):
    source = str(folders["qwen2_5_vl"])
    rewrites = "{{ messages | length }}{% for m in messages %}{% for c in m.content %}"
    rewrites += "{{ c.text }}{% endfor %}{% endfor %}"
    processor = HostedProcessor.of(source, None, rewrites)
    with pytest.raises(TriptychError, match=f"{source}.*rewrites earlier turns"):
        processor.collate([dialogue(("a", "b"), ("c", "d"), images=())])
    processor.tokenizer.chat_template = None
    with pytest.raises(TriptychError, match=f"{source}.*no chat template.*model.template"):
        processor.collate([dialogue(("a", "b"), images=())])


def test_a_template_of_plain_strings_gets_strings(folders, dialogues):
    plain = (
        "{% for m in messages %}<|im_start|>{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}"
    )
    plain += "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    processor = HostedProcessor.of(str(folders["qwen2_5_vl"]), None, plain)
    batch = processor.collate(dialogues)
    assert supervised(processor, batch)[3] == "red<|im_end|>no<|im_end|>"
    assert batch.images.extra["image_grid_thw"].shape == (5, 3)


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_likelihoods_do_not_depend_on_the_batch(models, samples, dialogues, name):
    model, asked = models[name], samples if name == "paligemma" else dialogues
    one, many = (ModelPredictor(model, model.processor(), size) for size in (1, 8))
    answers = one.generate(asked, max_new_tokens=5)
    assert many.generate(asked, max_new_tokens=5) == answers
    assert len(set(answers)) > 1
    assert one.capabilities == {"generate", "loglikelihood", "sentences"}
    candidates = [["red", "a blue circle"]] * len(asked)
    alone, together = (p.loglikelihood(asked, candidates) for p in (one, many))
    for row, other in zip(alone, together, strict=True):
        assert [s.tokens for s in row] == [s.tokens for s in other]
        assert [s.sum for s in row] == pytest.approx([s.sum for s in other], rel=1e-4)
    assert one.vision_calls == sum(len(s.images) for s in asked) * 3  # no image is shared


def test_a_prompt_is_how_the_training_row_begins(models, samples):
    for model in models.values():
        processor = model.processor()
        whole = processor.collate(samples[:1]).text["language"]
        start = processor.prompts(samples[:1]).text["language"].ids[0]
        assert whole.ids[0, : len(start)].tolist() == start.tolist()
        assert (whole.labels[0, : len(start)] == IGNORE).all()
        assert whole.labels[0, len(start)] != IGNORE


def test_long_samples_are_cut_behind_their_images_or_refused(models, dialogue):
    model = models["smolvlm"]
    processor = model.processor()
    sample = dialogue(("what color?", "red " * 30), name="long")
    whole = processor.collate([sample]).text["language"].ids.shape[1]
    processor.max_length = whole - 20
    batch = processor.collate([sample])
    assert batch.text["language"].ids.shape[1] == whole - 20
    assert torch.isfinite(mean_loss(model, batch))
    processor.max_length = 8
    with pytest.raises(DataError, match="'long' is longer than data.max_length=8"):
        processor.collate([sample])


def test_bad_samples_are_named(models, pictures):
    processor = models["qwen2_5_vl"].processor()
    two = Sample([user("what?", 2), assistant("red")], [pictures[0]], id="row 8")
    with pytest.raises(DataError, match="row 8.*writes 2 images.*brings 1"):
        processor.collate([two])
    with pytest.raises(DataError, match="row 9.*nothing to predict"):
        processor.collate([Sample([user("what?", 1)], [pictures[0]], id="row 9")])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_lora_by_role_runs_inside_the_library(folders, samples, name, method):
    model = adapted(folders[name], TRAINS, method)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapters = {n for n in trained if "lora_" in n}
    assert adapters and all(n.startswith("language.") for n in adapters)
    assert {n.split(".")[0] for n in trained - adapters} == {"connector"}
    assert not any("vision" in n or "visual" in n for n in adapters)
    inside = [n for n, m in model.library.named_modules() if type(m).__name__ == "Linear4bit"]
    assert bool(inside) == (method == "nf4") and not any("lm_head" in n for n in inside)
    mean_loss(model, model.processor().collate(samples)).backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {n for n in trained if "lora_A" not in n}  # B starts at zero


def test_frozen_means_eval_inside_the_library_too(folders):
    model = adapted(folders["qwen2_5_vl"], TRAINS)
    assert not any(m.training for m in model.vision.modules())
    assert model.library.training and not model.eval().library.training


@pytest.fixture
def questions(tmp_path) -> Path:
    """Eight questions about four pictures in a JSONL file."""
    from PIL import Image

    rows = []
    for i, color in enumerate(["red", "green", "blue", "yellow"]):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{i}.png")
        for question, answer in (("what color?", color), ("is it a circle?", "no")):
            rows.append({"image": f"{i}.png", "text": f"User: {question}\nAssistant: {answer}"})
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def options(questions: Path) -> list[str]:
    return [
        "data=instructions",
        f"data.path={questions / 'questions.jsonl'}",
        f"data.images={questions}",
        "data.batch_size=2",
        "data.workers=0",
        "peft.lora.r=2",
        "peft.lora.lora_dropout=0.1",
        "trainer.max_steps=4",
        "trainer.accelerator=cpu",
        "eval.limit=20",
        "eval.blind=none",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_resumes_evaluates_and_answers(
    folders, questions, pictures, name, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    from triptych import run
    from triptych.checkpoint import Checkpoints

    class Often(Checkpoints):
        def __init__(self, folder: Path, **settings: object) -> None:
            super().__init__(folder, steps=2)

    monkeypatch.setattr(run, "Checkpoints", Often)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    run.train(compose_preset(f"hf:{folders[name]}", options(questions)), whole)
    results = json.loads((whole / "results.json").read_text())
    assert results["metrics"]["easy_vqa/accuracy"]["n"] == 20
    trained = load_file(whole / "bundle/weights.safetensors")
    assert any("lora_A" in n for n in trained) and not any(n.startswith("vision") for n in trained)

    half = "checkpoints/step-00000002.ckpt"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / half, resumed / half)
    again = compose_preset(f"hf:{folders[name]}", [*options(questions), "ckpt=last"])
    again.benchmark = None
    run.train(again, resumed)
    continued = load_file(resumed / "bundle/weights.safetensors")
    assert trained.keys() == continued.keys()
    assert all(torch.equal(trained[n], continued[n]) for n in trained)

    used = load(whole)
    tensors = dict(used.model.named_parameters())
    assert all(torch.equal(tensors[n], t) for n, t in trained.items())
    answers = used.answer([r.open() for r in pictures[:2]], "what color?", max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(a, str) for a in answers)


def test_other_layouts_have_roles_too(tmp_path):
    """BLIP-2: its head is inside the decoder, its connector is a Q-Former, a table and a linear."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Blip2Config(
        vision_config={**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        qformer_config={
            **small,
            "num_attention_heads": 2,
            "encoder_hidden_size": 32,
            "vocab_size": 9,
        },
        text_config={
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 50,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 40,
        },
        num_query_tokens=4,
        image_token_id=49,
    )
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    ids = torch.tensor([[49] * 4 + [5, 6, 7, 2]])
    labels = torch.where(torch.arange(8) > 5, ids, IGNORE)
    tokens = Tokens(ids, torch.arange(8)[None], torch.ones_like(ids), labels)
    images = Images(["one"], extra={"pixel_values": torch.randn(1, 3, 32, 32)})
    batch = BatchType(images, torch.tensor([[0, 0, 1]]), {"language": tokens}, [])
    model = adapted(tmp_path, {"vision": "frozen", "connector": "lora", "language": "frozen"})
    names = {n for n, _ in model.connector.named_parameters()}
    assert "query_tokens" in names and "language_projection.lora_A.default.weight" in names
    theirs = model.eval().library(**model.inputs(batch), labels=labels).loss
    torch.testing.assert_close(mean_loss(model, batch), theirs)
    before = model(batch).detach()
    with torch.no_grad():  # the adapter that stands here is the one the library runs
        model.connector.language_projection.lora_B["default"].weight.normal_()
        after = model(batch)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "gemma3"),
        *("idefics", "idefics2", "idefics3", "mllama", "glm4v", "instructblip", "blip-2"),
        *("mistral3", "deepseek_vl"),
        *("kosmos-2", "lfm2_vl", "ovis2", "video_llava", "aria"),
    ],
)
def test_roles_are_found_in_most_classes(kind):
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        library = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind))
    roles = find_roles(library)
    assert all(roles.values()), roles
    paths = [path for group in roles.values() for path in group]
    for name, _ in library.named_parameters():
        assert sum(name == p or name.startswith(p + ".") for p in paths) == 1, name


def test_what_is_no_such_model_is_refused(tiny, tmp_path):
    with pytest.raises(TriptychError, match="Llama model, which takes no images"):
        HostedVLM(str(tiny / "language"))
    with pytest.raises(TriptychError, match="neither a local folder nor a hub id"):
        HostedVLM(str(tmp_path / "nothing"))

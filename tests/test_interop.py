"""Official checkpoints in and out, against the library's own classes on small random configs."""

from __future__ import annotations

import json

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from triptych.interop import from_hf, to_hf
from triptych.models.fusion import IMAGE
from triptych.types import Batch, Images, Tokens, TriptychError

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory, tokenizer):
    """A folder with a small random LLaVA and its tokenizer, as the hub has them."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    text = LlamaConfig(**tiny_llama.fields(tokenizer, vocab_size=len(tokenizer) + 1))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=len(tokenizer),
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # so that logits differ by more than rounding
        for parameter in model.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inputs(model, rows: int = 2) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """A batch of ours, and the ids and pixels the library's class takes for the same."""
    generator = torch.Generator().manual_seed(3)
    size, image = model.vision.transform.size, model.official.image_token_index
    pixels = torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(6, image, (rows, 30), generator=generator)
    ids[:, 3 : 3 + model.placeholders(*size)] = IMAGE
    segments = torch.ones_like(ids)
    positions = torch.arange(30).expand_as(ids)
    slots = torch.tensor([[i, i, 1] for i in range(rows)])
    batch = Batch(
        Images([str(i) for i in range(rows)], pixels),
        slots,
        {"language": Tokens(ids, positions, segments)},
        [],
    )
    return batch, ids.masked_fill(ids == IMAGE, image), model.vision.transform.normalize(pixels)


def logits(model, batch):
    with torch.inference_mode():
        return model.language.logits(model(batch))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llava_has_the_librarys_logits_and_answers(llava, attention):
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(
        llava, dtype=torch.float32, attn_implementation=attention
    ).eval()
    ours = from_hf(llava, attention=attention)
    batch, ids, pixels = inputs(ours)
    with torch.inference_mode():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    settings = {"max_new_tokens": 12, "do_sample": False}
    answer = theirs.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **settings
    )[:, ids.shape[1] :]
    assert ours.generate(batch, **settings).tolist() == answer.tolist()


def test_to_hf_writes_what_from_pretrained_reads(llava, tmp_path):
    from transformers import LlavaForConditionalGeneration

    ours = from_hf(llava)
    folder = to_hf(ours, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (llava, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch, ids, pixels = inputs(ours)
    with torch.inference_mode():
        expected = theirs.eval()(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=1e-5)


def test_a_model_of_ours_becomes_an_official_one(vlm, dialogue, tmp_path):
    """It had no image token; the folder has one, which is never the most likely token."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    vocabulary = vlm.language.config.vocab_size
    folder = to_hf(vlm.eval(), tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image = theirs.config.image_token_index
    assert AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("<image>") == image
    batch = vlm.processor().prompts([dialogue(("what color is the shape?", "red"))])
    ids = batch.text["language"].ids
    with torch.inference_mode():
        expected = theirs(
            input_ids=ids.masked_fill(ids == IMAGE, image),
            pixel_values=vlm.vision.transform.normalize(batch.images.pixels),
        ).logits
    torch.testing.assert_close(logits(vlm, batch), expected[..., :vocabulary], rtol=0, atol=1e-5)
    assert (expected.argmax(-1) < vocabulary).all()
    again = from_hf(folder)
    assert again.vision.transform == vlm.vision.transform
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("multi_modal_projector.linear_2.bias"), "lacks .*linear_2.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "also holds extra"),
    ],
)
def test_missing_and_left_over_tensors_are_named(llava, tmp_path, change, message):
    import shutil

    folder = shutil.copytree(llava, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TriptychError, match=message):
        from_hf(folder)


def test_a_projector_we_cannot_build_is_refused(llava, tmp_path):
    import shutil

    folder = shutil.copytree(llava, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "relu"}))
    with pytest.raises(TriptychError, match="relu.*model=hf"):
        from_hf(folder)


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2"])
def test_vision_towers_alone(family, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**VISION)
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    ours = from_hf(tmp_path / "in")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        out = theirs(ours.transform.normalize(pixels), output_hidden_states=True)
        features = ours.eval()(Images(["a", "b"], pixels))
    expected = out.hidden_states[-1][:, -16:].flatten(0, 1)
    torch.testing.assert_close(features.tokens, expected, rtol=0, atol=1e-5)
    folder = to_hf(ours, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "in", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert from_hf(folder).transform == ours.transform


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_language_models_alone(family, tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    ours = from_hf(tmp_path / "in").eval()
    ids = torch.randint(6, len(tokenizer), (2, 9))
    tokens = Tokens(ids, torch.arange(9).expand(2, 9), torch.ones_like(ids))
    with torch.inference_mode():
        mine = ours.logits(ours(ours.embed(tokens), tokens))
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=0, atol=1e-5)
    folder = to_hf(ours, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "in", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert from_hf(folder).tokenizer.get_vocab() == tokenizer.get_vocab()


def test_adapters_and_used_folders_are_refused(vlm, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(TriptychError, match="not an empty folder"):
        to_hf(vlm, tmp_path / "used")
    vlm.language.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(TriptychError, match="merge them"):
        to_hf(vlm, tmp_path / "out")

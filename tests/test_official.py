"""Official folders of the dual encoders, BLIP, BLIP-2 and InstructBLIP: in, used, out again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_dual import inputs as dual_inputs
from test_dual import official
from test_image_text import READ, SLOTS, pixels, tokens_of
from test_image_text import reference as blip_reference
from test_qformer import CASES, T5, batch_of
from test_qformer import reference as blip2_reference

from triptych.interop import from_hf, to_hf
from triptych.objectives.image_text import similarity
from triptych.types import Batch, TriptychError


def saved(model, tokenizer, folder):
    """The model and a tokenizer in one folder, as the hub has them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def comes_back(ours, folder, out) -> None:
    """The folder that `to_hf` writes holds the same names and the same tensors."""
    before, after = load_file(folder / "model.safetensors"), None
    after = load_file(to_hf(ours, out) / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("clip", "eager"), ("clip", "sdpa"), ("siglip", "eager"), ("siglip", "sdpa")]
    + [("align", "eager")],  # the library has no other for it
)
def test_dual_encoders(name, attention, tokenizer, tmp_path):
    theirs = official(name)
    theirs.set_attn_implementation(attention)
    folder = saved(theirs, tokenizer, tmp_path / "theirs")
    ours = from_hf(folder, attention=attention)
    _ = ours.unused  # traces outlines of the towers, whose attention stays as it was
    towers = ours.vision.model, ours.text.model
    assert [tower.config._attn_implementation for tower in towers] == [attention] * 2
    images, tokens = dual_inputs()
    with torch.no_grad():
        out = theirs(
            pixel_values=ours.vision.transform.normalize(images.pixels),
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
        )
        torch.testing.assert_close(
            ours.embed_images(images)[:, 0], out.image_embeds, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(ours.embed_texts(tokens), out.text_embeds, rtol=0, atol=1e-5)
    comes_back(ours, folder, tmp_path / "ours")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval"])
def test_matching(kind, attention, tokenizer, tmp_path):
    theirs = blip_reference(kind, attention)
    folder = saved(theirs, tokenizer, tmp_path / "theirs")
    ours = from_hf(folder, attention=attention if kind.startswith("Blip2") else "eager")
    images = pixels()
    batch, second = Batch(images, SLOTS, {"text": READ}, []), kind.startswith("Blip2")
    given = {
        "pixel_values": ours.vision.transform.normalize(images.pixels),
        "input_ids": READ.ids,
        "attention_mask": READ.mask.long(),
    }
    flag = "use_image_text_matching_head" if second else "use_itm_head"
    with torch.no_grad():
        compared = similarity(ours.embed_images(images), ours.embed_texts(READ))
        near, matched = theirs(**given, **{flag: False}), theirs(**given, **{flag: True})
        scores = near.logits_per_image if second else near.itm_score
        pairs = matched.logits_per_image if second else matched.itm_score
        torch.testing.assert_close(compared, scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.match(batch), pairs, rtol=1e-5, atol=1e-5)
    comes_back(ours, folder, tmp_path / "ours")


def test_blip_captions_and_answers(tokenizer, tmp_path):
    images = pixels()
    for kind in ("BlipForConditionalGeneration", "BlipForQuestionAnswering"):
        theirs = blip_reference(kind)
        folder = saved(theirs, tokenizer, tmp_path / kind)
        ours = from_hf(folder, attention="eager")
        ours.connector.set_tokenizer(str(folder), None, 400, 40)  # the small vocabulary is foreign
        values = ours.vision.transform.normalize(images.pixels)
        decoder = tokens_of([[1, 7, 9, 2], [1, 8, 2, 0]])
        asked = {} if kind == "BlipForConditionalGeneration" else {"question": READ}
        batch = Batch(images, SLOTS, {"decoder": decoder, **asked}, [])
        with torch.no_grad():
            seen = theirs.vision_model(values).last_hidden_state
            mask = torch.ones(seen.shape[:2], dtype=torch.long)
            if asked:
                mask = READ.mask.long()
                read = theirs.text_encoder(READ.ids, mask, encoder_hidden_states=seen)
                seen = read.last_hidden_state
            expected = theirs.text_decoder(
                decoder.ids,
                attention_mask=decoder.mask.long(),
                encoder_hidden_states=seen,
                encoder_attention_mask=mask,
            ).logits
            torch.testing.assert_close(ours.logits(ours(batch)), expected, rtol=1e-5, atol=1e-5)
            start = Batch(images, SLOTS, {"decoder": tokens_of([[1, 7], [1, 9]]), **asked}, [])
            cached = ours.generate(start, max_new_tokens=5)
            assert torch.equal(cached, ours.generate(start, max_new_tokens=5, use_cache=False))
        comes_back(ours, folder, tmp_path / f"ours-{kind}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "text"), CASES)
def test_generative_q_formers(family, text, attention, tokenizer, tmp_path):
    theirs = blip2_reference(family, text, attention)
    folder = saved(theirs, tokenizer, tmp_path / "theirs")
    ours = from_hf(folder, attention=attention)
    ours.language.__dict__["stop_ids"] = [2]
    batch, ids = batch_of(decoder=text is T5)
    given = {
        "pixel_values": ours.vision.transform.normalize(batch.images.pixels),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    if family == "instructblip":
        read = batch.text["text"]
        given |= {"qformer_input_ids": read.ids, "qformer_attention_mask": read.mask.long()}
    extra = {"decoder_input_ids": batch.text["decoder"].ids} if text is T5 else {}
    with torch.no_grad():
        expected = theirs(**given, **extra).logits
        torch.testing.assert_close(
            ours.language.logits(ours(batch)), expected, rtol=1e-5, atol=1e-5
        )
        cached = ours.generate(batch, max_new_tokens=5)
        assert torch.equal(cached, ours.generate(batch, max_new_tokens=5, use_cache=False))
    comes_back(ours, folder, tmp_path / "ours")


def test_a_model_that_came_from_no_checkpoint_is_not_written(tiny, tmp_path):
    from test_image_text import make

    with pytest.raises(TriptychError, match="no official format"):
        to_hf(make(tiny, "blip"), tmp_path / "out")


def test_an_unknown_architecture_is_named(tmp_path):
    from transformers import IdeficsConfig

    IdeficsConfig().save_pretrained(tmp_path)
    with pytest.raises(TriptychError, match="idefics.*model=hf"):
        from_hf(tmp_path)

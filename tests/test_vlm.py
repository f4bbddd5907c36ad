"""The VLM wiring: parts of many kinds, generation, and answers that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from triptych.models.vlm import first_alike
from triptych.parts.connector import MLPConnector
from triptych.parts.language import LanguageModel
from triptych.parts.vision import VisionEncoder
from triptych.types import ImageFeatures, Images, TriptychError

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {
    "clip_vision_model": (VIT, 1, 16, 32),
    "siglip_vision_model": (VIT, 0, 16, 32),
    "dinov2": (VIT, 1, 16, 32),
    "vit": (VIT, 1, 16, 32),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, 0, 16, 16),
    "swin": (
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 1],
            "window_size": 4,
        },
        0,
        64,
        16,
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_any_tower_knows_its_tokens_and_width(kind):
    from triptych.data.transforms import ImageTransform

    fields, special, grid, dim = TOWERS[kind]
    transform = ImageTransform(size=(32, 32))
    config = {"model_type": kind, **fields}
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for select, count in (("patch", grid), ("cls_patch", grid + special)):
        tower = VisionEncoder(config=config, select=select, transform=transform).eval()
        features = tower(Images(["a", "b"], pixels))
        assert tower.dim == dim and tower.num_tokens(32, 32) == count
        assert features.counts.tolist() == [count, count]
        assert features.tokens.shape == (2 * count, dim)


def test_layer_minus_two_is_the_librarys_and_the_rest_is_unused(tiny):
    from transformers import CLIPVisionModel

    tower = VisionEncoder(str(tiny / "vision"), layer=-2).eval()
    reference = CLIPVisionModel.from_pretrained(tiny / "vision").eval()
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    normal = tower.transform.normalize(pixels)
    theirs = reference(pixel_values=normal, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(Images(["a"], pixels)).tokens, theirs.flatten(0, 1))
    assert tower.unused == ("model.encoder.layers.2", "model.post_layernorm")
    names = {n for n, _ in tower.named_parameters()}
    assert {f"model.{n}" for n, _ in reference.named_parameters()} == names  # kept for export


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2", "mistral", "gpt_neox", "gemma2"])
def test_any_decoder_gives_the_librarys_logits(kind, dialogue, tokenizer, tmp_path, pictures):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64, "ffn_dim": 64, "head_dim": 8, "word_embed_proj_dim": 16,
        "n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    part = LanguageModel(str(tmp_path)).eval()
    from triptych.data.processor import ChatProcessor, ImageLoader
    from triptych.data.transforms import ImageTransform

    processor = ChatProcessor(part.tokenizer, ImageLoader(ImageTransform()), placeholders=0)
    sample = dialogue(("what color is the shape?", "red"), images=())
    tokens = processor.collate([sample]).text["language"]
    with torch.no_grad():
        ours = part.logits(part(part.embed(tokens), tokens))
        theirs = reference(input_ids=tokens.ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_shuffling_folds_neighbours_into_one_token():
    torch.manual_seed(0)
    connector = MLPConnector(2, 5, depth=1, shuffle=2)
    tokens = torch.randn(16, 2)  # a 4 x 4 grid
    out = connector(ImageFeatures(tokens, torch.tensor([16])))
    corner = torch.cat([tokens[i] for i in (0, 1, 4, 5)])
    torch.testing.assert_close(out.tokens[0], connector.layers[0](corner))
    assert out.counts.tolist() == [4] and connector.num_tokens(16) == 4
    with pytest.raises(TriptychError, match="shuffle=2"):
        connector.num_tokens(15)


def test_swapping_an_image_changes_only_its_own_row(vlm, dialogue):
    processor = vlm.eval().processor()
    first = processor.collate([dialogue(("what?", "red"), images=(i,)) for i in (0, 1)])
    other = processor.collate([dialogue(("what?", "red"), images=(i,)) for i in (0, 2)])
    with torch.no_grad():
        a, b = vlm(first), vlm(other)
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_text_only_and_many_images_stand_in_one_batch(vlm, dialogue):
    samples = [
        dialogue(("what color is it?", "red"), images=images, name=str(images))
        for images in ((), (0,), (1, 2), (0, 0))
    ]
    batch = vlm.eval().processor().collate(samples)
    assert batch.slots[:, :2].tolist() == [[0, 1], [1, 2], [2, 2], [0, 3], [0, 3]]
    with torch.no_grad():
        together = vlm(batch)
        for row, sample in enumerate(samples):
            alone = vlm(vlm.processor().collate([sample]))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "length_penalty": 0.5}])
def test_lending_a_prefix_changes_no_answer(vlm, dialogue, decoding):
    """Several questions of an image in one batch, with the prefix read once, against one by one."""
    vlm.eval()
    words = ("what?", "is there a circle in the image?", "describe the picture:", "color")
    samples = [
        dialogue((w, "x"), images=images, name=f"{w} {images}")
        for images in ((0,), (1,), (), (1, 2))
        for w in words
    ]
    processor = vlm.processor()

    def answers(chosen):
        batch = processor.prompts(chosen)
        return processor.decode(vlm.generate(batch, max_new_tokens=6, **decoding))

    single = [answers([s])[0] for s in samples]
    assert answers(samples) == single
    assert len(set(single)) > 4  # the prompts matter
    assert first_alike(processor.prompts(samples)).tolist() == [
        0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12
    ]  # fmt: skip


@pytest.mark.parametrize("penalty", [-4.0, 1.0, 4.0])
def test_beams_over_a_lent_prefix_equal_beams_that_read_it_themselves(vlm, dialogue, penalty):
    """The same rows with the prefix read once and lent, and read by every row and beam."""
    vlm.eval()
    words = ("what?", "is there a circle in the image?", "describe the picture:", "color")
    samples = [dialogue((w, "x"), images=i, name=f"{w}{i}") for i in ((0,), (1,)) for w in words]
    batch = vlm.processor().prompts(samples)
    tokens = batch.text["language"]
    decoding = {"num_beams": 3, "length_penalty": penalty, "max_new_tokens": 6}
    with torch.inference_mode():
        embeds, _ = vlm.fusion(vlm.language.embed(tokens), vlm.visual(batch), batch)
        lent = vlm.language.generate(embeds, tokens, first=first_alike(batch), **decoding)
        alone = vlm.language.generate(embeds, tokens, first=None, **decoding)
    assert lent.tolist() == alone.tolist()
    assert len({tuple(row) for row in lent.tolist()}) > 3


def test_greedy_generation_equals_the_librarys_on_text(vlm, dialogue):
    vlm.eval()
    processor = vlm.processor()
    batch = processor.prompts([dialogue(("what color is the shape?", "x"), images=())])
    ours = vlm.generate(batch, max_new_tokens=8)
    ids = batch.text["language"].ids
    theirs = vlm.language.model.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=vlm.language.stop_ids
    )
    assert ours.tolist() == theirs[:, ids.shape[1] :].tolist()


def test_placeholders_and_visual_tokens_must_agree(vlm, dialogue):
    processor = vlm.processor()
    processor.placeholders = 15
    with pytest.raises(TriptychError, match="15 image placeholders but 16 visual tokens.*row 1"):
        vlm(processor.collate([dialogue(("a", "b"), name="row 1")]))

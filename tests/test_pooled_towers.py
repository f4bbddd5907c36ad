"""Towers read at one token, and captions grouped by length: the same embeddings and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from triptych.data.transforms import ImageTransform
from triptych.models import dual
from triptych.models.dual import DualEncoder, Heads
from triptych.parts.text import TextEncoder
from triptych.parts.vision import VisionEncoder
from triptych.types import Images, Tokens

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {"vocab_size": 60, "max_position_embeddings": 20, **SIZES}


def captions(rows: int = 70, longest: int = 16) -> Tokens:
    torch.manual_seed(3)
    ids = torch.randint(3, 58, (rows, longest))
    lengths = torch.randint(3, longest + 1, (rows,))
    lengths[0] = longest
    columns = torch.arange(longest)
    mask = columns < lengths[:, None]
    ids[torch.arange(rows), lengths - 1] = 59
    return Tokens(ids * mask, columns.expand_as(ids), mask.long())


def gradients(part, run):
    part.zero_grad()
    out = run()
    out.square().sum().backward() if out.requires_grad else None
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    part.zero_grad()
    (run() * weight).sum().backward()
    return out, {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    for name in one[1].keys() | other[1].keys():
        a, b = (x.get(name, torch.zeros(())) for x in (one[1], other[1]))
        torch.testing.assert_close(a.expand_as(b), b.expand_as(a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["model", "last", "first"])
@pytest.mark.parametrize("end", [2, 59])
def test_a_clip_text_tower_read_at_one_token(pooling, end):
    torch.manual_seed(0)
    config = {"model_type": "clip_text_model", **TEXT, "eos_token_id": end}
    text, tokens = TextEncoder(config=config, pooling=pooling), captions()
    assert text._one_token
    own = gradients(text, lambda: text(tokens))

    def masked():  # every token of every block, under the padding mask
        out = text.model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
        if pooling == "model":
            return out.pooler_output
        at = tokens.mask.sum(1) - 1 if pooling == "last" else torch.zeros(70, dtype=torch.long)
        return out.last_hidden_state[torch.arange(70), at]

    same(own, gradients(text, masked))


def test_a_clip_vision_tower_read_at_its_class_token():
    torch.manual_seed(0)
    config = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **SIZES}
    vision = VisionEncoder(config=config, transform=ImageTransform(size=(16, 16)))
    images = Images(["a", "b"], torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    every = gradients(vision, lambda: vision(images).pooled)
    vision.read_pooled()
    assert vision.pooled_only
    seen = []
    vision.model.encoder.layers[-1].mlp.register_forward_hook(
        lambda m, i, o: seen.append(i[0].shape)
    )
    same(gradients(vision, lambda: vision(images).pooled), every)
    assert seen[0] == (2, 32)


@pytest.mark.parametrize("chunk", [0, 16])
def test_captions_of_like_length_run_together_in_the_same_order(chunk):
    torch.manual_seed(0)
    config = {"model_type": "clip_text_model", **TEXT, "eos_token_id": 59}
    text, tokens, widths = TextEncoder(config=config), captions(), []
    text.register_forward_pre_hook(lambda m, args: widths.append(args[0].ids.shape[1]))
    own = gradients(text, lambda: dual._by_length(text, tokens, chunk))
    assert len(set(widths)) > 1 and max(widths) == 16
    same(own, gradients(text, lambda: text(tokens)))


def test_groups_by_length_are_left_out_where_large_embeddings_would_get_their_gradients():
    config = {"model_type": "clip_text_model", **TEXT, "vocab_size": 50_000, "eos_token_id": 59}
    text, tokens, widths = TextEncoder(config=config), captions(), []
    text.register_forward_pre_hook(lambda m, args: widths.append(args[0].ids.shape[1]))
    dual._by_length(text, tokens, 0)
    assert widths == [16]
    with torch.no_grad():  # no gradients, no cost
        dual._by_length(text, tokens, 0)
    assert len(set(widths[1:])) > 1


def test_a_dual_encoder_reads_the_class_token_alone():
    vision = VisionEncoder(
        config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **SIZES},
        transform=ImageTransform(size=(16, 16)),
    )
    text = TextEncoder(config={"model_type": "clip_text_model", **TEXT, "eos_token_id": 59})
    assert DualEncoder(vision, text, partial(Heads, dim=8)).vision.pooled_only

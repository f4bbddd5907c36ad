"""The demo page: what it answers, with the tiny models; served once on loopback."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from triptych.api import Loaded
from triptych.apps import demo
from triptych.types import TriptychError

gradio = pytest.importorskip("gradio")


@pytest.fixture
def writer(vlm):
    cfg = OmegaConf.create({"model": {"name": "llava"}})
    return Loaded(vlm.eval(), vlm.processor(), cfg)


@pytest.fixture
def embedder(tiny, tokenizer, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    from triptych.models.dual import DualEncoder, Heads
    from triptych.parts.text import TextEncoder
    from triptych.parts.vision import VisionEncoder

    torch.manual_seed(2)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=24, **size
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vision = VisionEncoder(str(tiny / "vision"))
    model = DualEncoder(vision, TextEncoder(str(tmp_path)), partial(Heads, dim=8)).eval()
    return Loaded(model, model.processor(), OmegaConf.create({"model": {"name": "clip"}}))


def test_the_answer_is_the_models(writer, pictures):
    picture = pictures[0].open()
    said = demo.answer(writer, picture, "what color?", 6, 1)
    assert said == writer.answer(picture, "what color?", max_new_tokens=6)
    beams = writer.answer(picture, "what color?", max_new_tokens=6, num_beams=3)
    assert demo.answer(writer, picture, "what color?", 6, 3) == beams
    assert isinstance(demo.answer(writer, None, "what color?", 3, 1), str)


def test_captions_are_ranked_by_their_cosine(embedder, pictures):
    picture = pictures[0].open()
    found = demo.rank(embedder, picture, "a circle\n\n yes \na circle")
    cosines = embedder.embed(images=[picture]) @ embedder.embed(texts=["a circle", "yes"]).T
    assert list(found) == ["a circle", "yes"]
    expected = cosines[0].clamp_min(0).tolist()
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(TriptychError, match="at least one caption"):
        demo.rank(embedder, picture, " \n")


def test_the_page_offers_what_the_model_can_do(writer, embedder):
    def offered(loaded):
        page = demo.build(loaded, "<b>mine</b>")
        return {fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"}

    assert "ask" in offered(writer) and "compare" not in offered(writer)
    assert "compare" in offered(embedder) and "ask" not in offered(embedder)


def test_the_page_is_served_on_loopback(writer):
    import urllib.request

    page = demo.build(writer, "mine")
    _, address, _ = demo.serve(page, prevent_thread_lock=True, quiet=True)
    try:
        with urllib.request.urlopen(address, timeout=30) as reply:
            assert reply.status == 200 and b"Triptych" in reply.read()
    finally:
        page.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["port=80"], "run= is missing"),
        (["run=x", "colour=red"], "'colour=red' is no option"),
        (["run=x", "port=high"], "port=high must be a number"),
        (["run=nowhere"], "no model=nowhere|nowhere"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    import re

    assert demo.main(words) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1

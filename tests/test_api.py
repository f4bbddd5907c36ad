"""Use without training: load, answer, embed, and the ask app."""

from __future__ import annotations

import json
from functools import partial

import pytest
import tiny_hosted
import torch
from omegaconf import OmegaConf
from PIL import Image

from triptych.api import Loaded, load
from triptych.apps import ask
from triptych.bundle import compose_preset
from triptych.types import TriptychError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("one") / "it's a model"  # quotes and spaces in the name
    torch.manual_seed(0)
    tiny_hosted.smolvlm(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder) -> Loaded:
    return load(f"hf:{folder}")


@pytest.fixture
def photos(tmp_path, pictures):
    """Three pictures in a folder with a broken one, a text file and a picture further down."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for i, ref in enumerate(pictures[:3]):
        ref.open().save(place / ("more" if i == 2 else "") / f"{i}.png")
    (place / "broken.png").write_bytes((place / "0.png").read_bytes()[:60])
    (place / "notes.txt").write_text("no picture")
    return place


def test_answers_for_one_and_for_many(loaded, photos, pictures):
    one = loaded.answer(photos / "0.png", "what color?", max_new_tokens=4)
    assert isinstance(one, str) and one
    many = loaded.answer([r.open() for r in pictures[:3]], "what color?", max_new_tokens=4)
    assert many[0] == one and len(set(many)) > 1
    pairs = loaded.answer(str(photos / "0.png"), ["what color?", "a circle?"], max_new_tokens=4)
    assert pairs[0] == one and len(pairs) == 2
    assert isinstance(loaded.answer(None, "hello?", max_new_tokens=4), str)
    with pytest.raises(TriptychError, match="2 images and 3 prompts do not pair"):
        loaded.answer([photos / "0.png"] * 2, ["a", "b", "c"])


def test_decoding_options_reach_the_model(loaded, photos):
    image = photos / "0.png"
    torch.manual_seed(0)
    drawn = {
        loaded.answer(image, "what?", do_sample=True, temperature=5.0, max_new_tokens=6)
        for _ in range(4)
    }
    assert len(drawn) > 1
    short, long = (loaded.answer(image, "what?", max_new_tokens=n) for n in (1, 8))
    assert len(short) < len(long)


def test_models_that_write_have_no_embeddings(loaded, photos):
    with pytest.raises(TriptychError, match="model=hf writes answers.*use .answer"):
        loaded.embed(images=photos / "0.png")


def test_embeddings_are_the_models_own_in_the_order_given(tiny, tokenizer, pictures, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    from triptych.models.dual import DualEncoder, Heads
    from triptych.parts.text import TextEncoder
    from triptych.parts.vision import VisionEncoder

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    vision = VisionEncoder(str(tiny / "vision"), layer=-1, select="cls_patch")
    model = DualEncoder(vision, TextEncoder(str(tmp_path)), partial(Heads, dim=8)).eval()
    cfg = OmegaConf.create({"model": {"name": "clip"}})
    two = Loaded(model, model.processor(), cfg)
    refs = [pictures[1], pictures[0], pictures[1]]
    images = two.embed(images=[r.open() for r in refs], batch_size=2)
    assert images.shape == (3, 8) and not torch.allclose(images[0], images[1])
    torch.testing.assert_close(images[0], images[2])
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    texts = two.embed(texts=["a red circle", "yes"])
    torch.testing.assert_close(texts[1:], two.embed(texts="yes"))
    with pytest.raises(TriptychError, match="one of the two"):
        two.embed()
    with pytest.raises(TriptychError, match="model=clip writes no answers"):
        two.answer(None, "what?")


def test_a_preset_is_loaded_by_its_name(tiny, photos):
    parts = [f"model.vision.weights={tiny}/vision", f"model.language.weights={tiny}/language"]
    preset = load("llava", parts)
    assert isinstance(preset.answer(photos / "0.png", "what?", max_new_tokens=2), str)


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("lava", [], "no model=lava; did you mean 'model=llava'"),
        ("hf", [], "model.id must be given"),
        ("hf:x", ["model.dtyp=auto"], "did you mean 'model.dtype'"),
    ],
)
def test_wrong_names_are_refused_in_a_sentence(name, options, sentence):
    with pytest.raises(TriptychError, match=sentence):
        compose_preset(name, options)


def test_a_folder_that_is_no_run_says_how_to_load_it(folder):
    with pytest.raises(TriptychError, match="is no run.*hf:"):
        load(folder)


def asked(capsys, *argv: object) -> tuple[int, str, str]:
    code = ask.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_ask_answers_a_folder_and_skips_what_is_broken(folder, photos, capsys, loaded):
    code, out, err = asked(
        capsys, "--model", "hf", "--id", folder, photos, "what color?", "a circle?",
        "--max-new-tokens", 4, "--batch-size", 3, "--format", "jsonl", "--device-map", "auto",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "1 of 4 images could not be read" in err and "4/4" in err
    assert [r["prompt"] for r in rows] == ["what color?", "a circle?"] * 4
    skipped = [r for r in rows if r["error"]]
    assert {r["image"] for r in skipped} == {str(photos / "broken.png")}
    for row in rows:
        if not row["error"]:
            same = loaded.answer(row["image"], row["prompt"], max_new_tokens=4)
            assert row["answer"] == same


def test_ask_writes_a_table_to_a_file(folder, photos, capsys, tmp_path):
    out = tmp_path / "answers.txt"
    code, shown, _ = asked(
        capsys, "--model", "hf", "--id", folder, photos / "0.png", "what?", "--out", out,
        "--max-new-tokens", 3, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0 and not shown and "what?" in out.read_text()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--model", "hf"], "go together"),
        (["--model", "llava", "--id", "x"], "go together"),
        (["--model", "llava", "--dtype", "auto"], "belong to --model hf"),
        (["--model", "hf", "--id", "x", "--device", "cpu", "--device-map", "auto"], "exclude"),
        (["--run", "nowhere"], "no model=nowhere|nowhere"),
    ],
)
def test_ask_refuses_in_a_sentence(photos, capsys, argv, sentence):
    import re

    code, _, err = asked(capsys, *argv, photos / "0.png", "what?")
    assert code == 2 and re.search(sentence, err) and err.count("\n") == 1


def test_ask_says_when_there_is_nothing_to_ask_about(tmp_path, capsys, folder):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.xyz", format="PNG")
    model = ("--model", "hf", "--id", folder)
    assert "holds no image" in asked(capsys, *model, tmp_path, "what?")[2]
    assert "does not exist" in asked(capsys, *model, tmp_path / "no.png", "what?")[2]

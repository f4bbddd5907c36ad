"""DualEncoder: parity with the official classes, any tower, chunks, and two ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from triptych.data.transforms import ImageTransform
from triptych.interop.dual import export, load_official, official_state
from triptych.models.dual import DualEncoder, Heads
from triptych.parts.pooling import AttentionPool, GridPool, PlacedAttentionPool, TokenPool
from triptych.parts.text import TextEncoder
from triptych.parts.vision import VisionEncoder
from triptych.types import ImageFeatures, Images, Tokens, TriptychError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2}
WORDS = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12}
VIT = {**SMALL, "image_size": 32, "patch_size": 8}
FOLD = {"image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}


def official(name: str):
    """A small random official model, its vision and text class names, and its embedding width."""
    import transformers as hf

    torch.manual_seed(0)
    if name == "clip":
        words = {**WORDS, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=words, vision_config=VIT, projection_dim=24))
    elif name == "siglip":
        words = {
            **WORDS,
            "projection_size": 32,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 1,
        }
        model = hf.SiglipModel(hf.SiglipConfig(text_config=words, vision_config=VIT))
        torch.nn.init.constant_(model.logit_scale, 2.3)
        torch.nn.init.constant_(model.logit_bias, -4.0)
    else:
        config = hf.AlignConfig(text_config=WORDS, vision_config=FOLD, projection_dim=160)
        model = hf.AlignModel(config)
        torch.nn.init.constant_(model.temperature, 0.6)
        model.vision_model.apply(_settle)
    return model.eval()


def _settle(module: torch.nn.Module) -> None:
    """Statistics of a BatchNorm that has seen data, so that nothing is 0 or 1 by default."""
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_mean.uniform_(-0.1, 0.1)
        module.running_var.uniform_(0.5, 1.5)


def ours(name: str, reference) -> DualEncoder:
    kinds = {"clip": "clip", "siglip": "siglip", "align": "align"}
    vision_config, text_config = (
        getattr(reference.config, f"{part}_config").to_dict() for part in ("vision", "text")
    )
    vision = VisionEncoder(
        config=vision_config, model_class=f"transformers.{_NAMES[kinds[name]]}VisionModel"
    )
    text = TextEncoder(
        config=text_config,
        pooling="first" if name == "align" else "model",
        model_class=f"transformers.{_NAMES[kinds[name]]}TextModel",
    )
    heads = {
        "clip": partial(Heads, dim=24),
        "siglip": partial(
            Heads, image_projection="identity", text_projection="identity", scale=10.0, bias=-10.0
        ),
        "align": partial(
            Heads, dim=160, image_projection="identity", projection_bias=True, scale=1.0
        ),
    }[name]
    return DualEncoder(vision, text, heads).eval()


_NAMES = {"clip": "CLIP", "siglip": "Siglip", "align": "Align"}


def inputs(rows: int = 5, size: int = 32) -> tuple[Images, Tokens]:
    """Pictures and captions that end on token 59, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(2, 58, (rows, 9), generator=generator)
    segments = torch.ones_like(ids)
    for row in range(rows):
        end = 3 + row % 6
        ids[row, end], ids[row, end + 1 :], segments[row, end + 1 :] = 59, 1, 0
    positions = torch.arange(9).expand_as(ids)
    return Images([str(i) for i in range(rows)], pixels), Tokens(ids, positions, segments)


@pytest.mark.parametrize("name", ["clip", "siglip", "align"])
def test_embeddings_loss_and_keys_equal_the_official_class(name, tmp_path, dual_batch):
    from triptych.objectives.contrastive import InfoNCE, Sigmoid

    reference = official(name)
    reference.save_pretrained(tmp_path / "theirs")
    model = ours(name, reference)
    load_official(model, str(tmp_path / "theirs"))
    images, tokens = inputs()
    with torch.no_grad():
        out = reference(
            pixel_values=model.vision.transform.normalize(images.pixels),
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            return_loss=True,
        )
        objective = {
            "clip": InfoNCE(),
            "siglip": Sigmoid(),
            "align": InfoNCE(smoothing=0.1),
        }[name]
        batch = dual_batch(images, tokens)
        loss = objective(model, batch)["contrastive"].sum / len(tokens.ids)
        embedded = model(batch)
    torch.testing.assert_close(embedded[0], out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedded[1], out.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=0, atol=1e-5)

    state, known = official_state(model), reference.state_dict()
    assert state.keys() == known.keys()
    for key, tensor in known.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-6, atol=1e-7)
    export(model, tmp_path / "ours")
    again, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        pixels = model.vision.transform.normalize(images.pixels)
        theirs = again.eval()(pixel_values=pixels, input_ids=tokens.ids).image_embeds
    torch.testing.assert_close(theirs, out.image_embeds, rtol=0, atol=1e-6)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = official("clip")
    reference.save_pretrained(tmp_path)
    model = ours("clip", reference)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TriptychError, match="holds extra.weight.*1 left over"):
        load_official(model, str(tmp_path))
    save_file(
        {k: v for k, v in state.items() if k != "logit_scale"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(TriptychError, match="lacks heads.logit_scale"):
        load_official(model, str(tmp_path))


# --- any tower ----------------------------------------------------------------------------------

STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
VISION = {
    "vit": {"model_type": "vit", **VIT},
    "dinov2": {"model_type": "dinov2", **SMALL, "image_size": 32, "patch_size": 8},
    "swin": {"model_type": "swin", **STAGES, "image_size": 32, "patch_size": 4},
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "efficientnet": {"model_type": "efficientnet", **FOLD},
    "siglip": {"model_type": "siglip_vision_model", **VIT},
}
POOLS = {"mean": TokenPool, "attention": partial(AttentionPool, heads=2)}
TEXT = {
    "clip": ({"model_type": "clip_text_model", **WORDS}, "last"),
    "bert": ({"model_type": "bert", **WORDS}, "mean"),
    "first": ({"model_type": "bert", **WORDS}, "first"),
    "siglip": ({"model_type": "siglip_text_model", **WORDS, "projection_size": 20}, "model"),
}


def build(vision: dict, text: dict, pooling: str, **heads) -> DualEncoder:
    torch.manual_seed(0)
    side = {"resnet": 32}.get(vision["model_type"], vision.get("image_size", 32))
    from triptych.data.transforms import ImageTransform

    encoder = VisionEncoder(config=vision, transform=ImageTransform(size=(side, side)))
    classes = {"siglip_text_model": "transformers.SiglipTextModel"}
    kind = classes.get(text["model_type"])
    words = TextEncoder(config=text, pooling=pooling, model_class=kind)
    return DualEncoder(encoder, words, partial(Heads, **{"dim": 16, **heads}))


@pytest.mark.parametrize("pool", ["model", *POOLS])
@pytest.mark.parametrize("name", VISION)
def test_every_vision_tower_and_pooling_trains_all_it_uses(name, pool, dual_batch):
    heads = {"pool": POOLS[pool]} if pool != "model" else {}
    _trains_all_it_uses(build(VISION[name], *TEXT["bert"], **heads), dual_batch)


@pytest.mark.parametrize("name", TEXT)
def test_every_text_tower_trains_all_it_uses(name, dual_batch):
    _trains_all_it_uses(build(VISION["vit"], *TEXT[name], text_projection="mlp"), dual_batch)


def _trains_all_it_uses(model: DualEncoder, dual_batch) -> None:
    from triptych.objectives.contrastive import InfoNCE

    batch = dual_batch(*inputs())
    images, texts = model(batch)
    for embedded in (images, texts):
        assert embedded.shape == (5, 16)
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(5))
    InfoNCE()(model, batch)["contrastive"].sum.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    named = {n for n, _ in model.named_parameters() for u in model.unused if _below(n, u)}
    assert without == named


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def test_a_caption_does_not_depend_on_its_padding():
    for text, pooling in TEXT.values():
        model = build(VISION["vit"], text, pooling).eval()
        tokens = inputs()[1]
        whole = model.embed_texts(tokens)
        length = int(tokens.mask[0].sum())
        alone = Tokens(
            tokens.ids[:1, :length], tokens.positions[:1, :length], tokens.segments[:1, :length]
        )
        if text["model_type"] != "siglip_text_model":  # which reads the last place of the row
            torch.testing.assert_close(model.embed_texts(alone)[0], whole[0], rtol=0, atol=1e-5)


def test_widths_that_do_not_meet_are_refused():
    with pytest.raises(TriptychError, match="heads.dim"):
        build(
            VISION["vit"],
            *TEXT["siglip"],
            dim=None,
            image_projection="identity",
            text_projection="identity",
        )
    with pytest.raises(TriptychError, match="vision.select=cls_patch"):
        build(VISION["vit"], *TEXT["bert"], pool=partial(TokenPool, how="first"))


def test_a_grid_holds_the_mean_of_each_cell_in_its_place():
    vision = VisionEncoder(config=VISION["vit"], transform=ImageTransform(size=(32, 32)))
    pool = GridPool(vision, cells=2)
    tokens = torch.zeros(2, 4, 4, vision.dim)  # 4 x 4 places of 8 pixels
    tokens[0, :2, 2:] = 3.0  # top right
    tokens[1, 3, 0] = 4.0  # one token of the bottom left
    features = ImageFeatures(tokens.view(32, -1), torch.tensor([16, 16]))
    cells = pool(features).view(2, vision.dim, 2, 2)
    assert pool.dim == 4 * vision.dim
    assert cells[0, 0].tolist() == [[0, 3], [0, 0]] and cells[1, 0].tolist() == [[0, 0], [1, 0]]
    with pytest.raises(TriptychError, match="it takes 1 to 4"):
        GridPool(vision, cells=5)
    wide = VisionEncoder(config=VISION["resnet"], transform=ImageTransform(size=(32, 64)))
    with pytest.raises(TriptychError, match="tokens on a square"):
        GridPool(wide)


def test_only_attention_with_places_tells_where_something_is():
    torch.manual_seed(0)
    vision = VisionEncoder(config=VISION["vit"], transform=ImageTransform(size=(32, 32)))
    tokens = torch.randn(16, vision.dim)
    moved = tokens.roll(5, 0)
    plain, placed = (
        kind(vision, heads=2, queries=3) for kind in (AttentionPool, PlacedAttentionPool)
    )
    for pool, differs in ((plain, False), (placed, True)):
        one, other = (pool(ImageFeatures(t, torch.tensor([16]))) for t in (tokens, moved))
        assert one.shape == (1, 3 * vision.dim) == (1, pool.dim)
        assert torch.allclose(one, other, atol=1e-5) is not differs


def test_a_tuned_tower_keeps_its_statistics_and_trains_its_weights():
    transform = ImageTransform(size=(32, 32))
    vision = VisionEncoder(config=VISION["resnet"], transform=transform, statistics="stored")
    vision.train()
    before = {n: b.clone() for n, b in vision.named_buffers()}
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    whole = vision(Images(list("abcd"), pixels)).pooled
    parts = [vision(Images([k], pixels[i : i + 1])).pooled for i, k in enumerate("abcd")]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    whole.square().sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in vision.named_buffers())
    assert all(p.grad is not None for p in vision.parameters())
    with pytest.raises(TriptychError, match="batch or stored"):
        VisionEncoder(config=VISION["resnet"], transform=transform, statistics="none")

"""Perceiver and gated cross-attention: Flamingo's identities."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from triptych.evaluation.model_predictor import ModelPredictor
from triptych.models.fusion import IMAGE, Gated, latest_image
from triptych.models.vlm import VLM
from triptych.objectives.tokens import NextToken
from triptych.parts.gated_attention import GatedCrossAttention, Media
from triptych.parts.language import LanguageModel
from triptych.parts.perceiver import PerceiverAttention, PerceiverResampler
from triptych.parts.vision import VisionEncoder
from triptych.types import IGNORE, SHARED, ImageFeatures, Sample, Tokens, assistant, user

RESAMPLER = partial(PerceiverResampler, queries=4, depth=2, heads=2, head_dim=8)
LANGUAGES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 2, "word_embed_proj_dim": 32},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


@pytest.fixture
def make(tiny):
    """A Flamingo over a decoder of this type, its gates opened if asked."""

    def flamingo(kind: str = "llama", gate: float = 0.0, every: int = 2) -> VLM:
        torch.manual_seed(0)
        config = {"model_type": kind, "vocab_size": 400, "num_hidden_layers": 4}
        language = LanguageModel(config=config | LANGUAGES[kind], tokenizer=str(tiny / "language"))
        with torch.no_grad():
            for parameter in language.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        vision = VisionEncoder(str(tiny / "vision"), layer=-2, select="cls_patch")
        model = VLM(vision, RESAMPLER, language, Gated(every=every, heads=2, head_dim=8))
        with torch.no_grad():
            for layer in model.fusion.layers:
                layer.attention_gate.fill_(gate)
                layer.mlp_gate.fill_(gate)
        return model.eval()

    return flamingo


def shots(pictures, names=(0, 1), question="what color?") -> Sample:
    messages = []
    for i in names:
        messages += [user(question, 1), assistant("red" if i % 2 else "blue")]
    return Sample(messages, [pictures[i] for i in names], id=str(names))


def test_perceiver_attention_and_resampler_are_idefics(tiny):
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(0)
    config = IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    theirs = IdeficsPerceiverResampler(config, 24, 2, 2, 8, 4).eval()
    ours = RESAMPLER(24, None, activation="relu").eval()
    names = {
        "latents": "latents",
        "layer_norm": "norm",
        "0.context_layer_norm": "attention.norm_states",
        "0.latents_layer_norm": "attention.norm_latents",
        "0.q_proj": "attention.query",
        "0.k_proj": "attention.key",
        "0.v_proj": "attention.value",
        "0.output_proj": "attention.out",
        "1.ln": "mlp.0",
        "1.fc": "mlp.1",
        "1.c_proj": "mlp.3",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        path, _, leaf = name.rpartition(".") if "." in name else (name, "", "")
        head, _, rest = path.partition(".")
        if head == "blocks":
            number, _, rest = rest.partition(".")
            state[f"blocks.{number}.{names[rest]}.{leaf}"] = tensor
        else:
            state[names[path] + (f".{leaf}" if leaf else "")] = tensor
    ours.load_state_dict(state)
    images = torch.randn(3, 7, 24)
    features = ImageFeatures(images.flatten(0, 1), torch.full((3,), 7))
    torch.testing.assert_close(
        ours(features).tokens.view(3, 4, 24), theirs(images), rtol=1e-5, atol=1e-5
    )


def test_padding_tokens_are_not_read():
    torch.manual_seed(0)
    resampler = RESAMPLER(24).eval()
    tokens = torch.randn(8, 24)
    both = resampler(ImageFeatures(tokens, torch.tensor([5, 3]))).tokens
    alone = [
        resampler(ImageFeatures(t, torch.tensor([len(t)]))).tokens for t in tokens.split([5, 3])
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LANGUAGES)
def test_closed_gates_leave_the_language_model_as_it_was(make, pictures, kind):
    model = make(kind)
    batch = model.processor().collate([shots(pictures), shots(pictures, (2,))])
    tokens = batch.text["language"]
    with torch.no_grad():
        embeds, media = model.fusion(model.language.embed(tokens), model.visual(batch), batch)
        assert media is not None
        plain = LanguageModel(config=model.language.config.to_dict())
        plain.load_state_dict(model.language.state_dict())
        plain._flat = False  # gated rows keep their padding, and so the order of sums
        assert torch.equal(model(batch), plain.eval()(embeds, tokens))


@pytest.mark.parametrize("kind", LANGUAGES)
def test_open_gates_see_and_cached_generation_equals_recomputation(make, pictures, kind):
    model = make(kind, gate=0.7)
    processor = model.processor()
    samples = [shots(pictures), shots(pictures, (2,))]
    prompts = processor.prompts(samples)
    model.language.__dict__["stop_ids"] = [399]
    cached = model.generate(prompts, max_new_tokens=5, use_cache=True)
    again = model.generate(prompts, max_new_tokens=5, use_cache=False)
    assert torch.equal(cached, again)
    # each step's choice is that of a whole forward over prompt and answer
    alone = [model.generate(processor.prompts([s]), max_new_tokens=5) for s in samples]
    assert torch.equal(cached, torch.cat(alone))
    swapped = processor.prompts([shots(pictures, (0, 3)), shots(pictures, (3,))])
    with torch.no_grad():
        assert (model(prompts) - model(swapped)).abs().max() > 1e-3
    assert "forward" not in model.language.model.__dict__  # the call leaves nothing behind


def test_beams_repeat_the_media_of_their_row(make, pictures):
    model = make(gate=0.7)
    model.language.__dict__["stop_ids"] = [399]
    processor = model.processor()
    samples = [shots(pictures), shots(pictures, (2,))]
    both = model.generate(processor.prompts(samples), max_new_tokens=4, num_beams=3)
    alone = [model.generate(processor.prompts([s]), max_new_tokens=4, num_beams=3) for s in samples]
    assert torch.equal(both, torch.cat(alone))


def test_each_token_looks_at_the_latest_image_only():
    torch.manual_seed(0)
    layer = GatedCrossAttention(16, 12, heads=2, head_dim=8)
    with torch.no_grad():
        layer.attention_gate.fill_(1.0)
    hidden, visual = torch.randn(1, 6, 16), torch.randn(1, 2, 3, 12)
    latest = torch.tensor([[-1, 0, 0, 1, 1, 1]])
    before = layer(hidden, Media(visual, latest))
    other = visual.clone()
    other[:, 0] *= 2  # the earlier image
    after = layer(hidden, Media(other, latest))
    changed = (before != after).any(-1)[0]
    assert changed.tolist() == [False, True, True, False, False, False]
    assert torch.equal(before[:, 0], layer(hidden, None)[:, 0])  # nothing seen, nothing added


def test_latest_image_by_hand():
    def row(ids, segments):
        ids, segments = torch.tensor([ids]), torch.tensor([segments])
        return latest_image(Tokens(ids, ids, segments))[0].tolist()

    i = IMAGE
    assert row([5, i, 6, i, 7, 0], [1, 1, 1, 1, 1, 0]) == [-1, 0, 0, 1, 1, -1]
    # a prefix with an image; segment 1 brings its own, segment 2 has the prefix's alone
    assert row([i, 5, i, 6, 7], [SHARED, 1, 1, 1, 2]) == [0, 0, 1, 1, 0]
    # no prefix image: segment 2 must not see segment 1's
    assert row([i, 6, 7], [1, 1, 2]) == [0, 0, -1]


def test_packed_rows_equal_their_samples(make, dialogue):
    model = make(gate=0.7)
    samples = [dialogue(("what color?", "red"), name="a"), dialogue(("circle?", "no"), name="b")]
    processor, objective = model.processor(), NextToken()
    with torch.no_grad():
        packed = objective(model, processor.rows([samples]))["next_token"].sum
        alone = sum(objective(model, processor.rows([[s]]))["next_token"].sum for s in samples)
    assert len(processor.rows([samples]).text["language"].ids) == 1
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_candidates_behind_one_prompt_see_its_latest_image(make, pictures):
    model = make(gate=0.7)
    asked, names = shots(pictures, (0, 1, 0)), ["blue", "a red one"]
    scored = ModelPredictor(model, model.processor(), 4).loglikelihood([asked], [names])[0]
    others = shots(pictures, (0, 1, 1))
    unlike = ModelPredictor(model, model.processor(), 4).loglikelihood([others], [names])[0]
    objective, processor = NextToken(), model.processor()
    for name, score, other in zip(names, scored, unlike, strict=True):
        batch = processor.collate([Sample([*asked.prompt, assistant(name)], asked.images)])
        labels = batch.text["language"].labels[0]
        labels[: len(labels) - score.tokens - int(labels[-1] == IGNORE)] = IGNORE
        assert int((labels != IGNORE).sum()) == score.tokens
        with torch.no_grad():
            alone = objective(model, batch)["next_token"].sum
        assert score.sum == pytest.approx(-float(alone), abs=1e-4)
        assert abs(score.sum - other.sum) > 1e-3, "the last image counts"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_new_parts_and_no_tensor_of_the_language_model(
    make, pictures, checkpointing
):
    from triptych.adapt import Quantization, adapt
    from triptych.table import merge

    model = make(gate=0.3)
    states = {"vision": "frozen", "connector": "full", "language": "frozen", "fusion": "full"}
    adapt(model, merge(model, states, {}, {}), None, Quantization())
    names = set(model.language.state_dict())
    batch = model.processor().collate([shots(pictures)])

    def gradients() -> dict:
        model.zero_grad()
        NextToken()(model, batch)["next_token"].sum.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    assert all(g.any() for g in plain.values())
    assert all(p.grad is None for p in model.language.parameters())
    assert set(model.language.state_dict()) == names
    if checkpointing:
        model.language.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_one_place_an_image_and_no_layer_before_the_first_block(make, pictures):
    model = make(every=2)
    assert len(model.fusion.layers) == 2
    ids = model.processor().collate([shots(pictures)]).text["language"].ids
    assert (ids == IMAGE).sum() == 2


def test_attention_reads_image_and_latents():
    torch.manual_seed(0)
    attention = PerceiverAttention(8, 2, 4)
    states, latents = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    before = attention(states, latents)
    latents[:, 2, 0] += 1
    assert (attention(states, latents)[:, 0] - before[:, 0]).abs().max() > 1e-5

"""Rows without padding, the last block where states are read, and thin LoRA: the same numbers."""

from __future__ import annotations

import pytest
import torch

from triptych.objectives.tokens import NextToken
from triptych.parts import block_mask, flat_rows
from triptych.parts.language import LanguageModel
from triptych.types import IGNORE, PAD, SHARED, Tokens

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
DECODERS = {
    "llama": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8},
    "mistral": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "gemma": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {**SIZES, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64},
    "opt": {**SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "phi": {**SIZES, "intermediate_size": 64},
}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0}


def rows() -> Tokens:
    """Three rows: a shared prefix with three samples, a prefix with one, and one sample alone."""
    segments = torch.tensor(
        [
            [SHARED] * 4 + [1] * 3 + [2] * 2 + [3] * 3,
            [SHARED] * 3 + [1] * 4 + [PAD] * 5,
            [1] * 6 + [PAD] * 6,
        ]
    )
    positions = torch.zeros_like(segments)
    for row, own in enumerate(segments.tolist()):
        shared = own.count(SHARED)
        for column, segment in enumerate(own):
            seen = own[:column].count(segment)
            positions[row, column] = seen if segment == SHARED else shared + seen
    torch.manual_seed(1)
    ids = torch.randint(3, 50, segments.shape)
    labels = torch.full_like(ids, IGNORE)
    for row, column in ((0, 6), (0, 8), (0, 11), (1, 6), (2, 5)):
        labels[row, column] = ids[row, column]
    return Tokens(ids, positions * (segments != PAD), segments, labels)


def decoder(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    config = {"model_type": kind, **DECODERS[kind]}
    language = LanguageModel(
        config={**config, **(DROPOUT if kind in ("gpt2", "opt", "phi") else {})}
    )
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return language


CASES = [(kind, flat_rows.CALL) for kind in DECODERS] + [("llama", 0), ("gemma", 0)]


@pytest.mark.parametrize(("kind", "call"), CASES)
def test_no_padding_and_few_states_read_give_loss_and_gradients_of_the_dense_mask(
    kind, call, monkeypatch
):
    monkeypatch.setattr(flat_rows, "CALL", call)  # 0: samples attend apart, behind their prefix
    tokens, language = rows(), decoder(kind)
    assert len(flat_rows.Pieces.of(tokens).parts) == (3 if call else 6)
    assert language._flat
    read = (tokens.labels != IGNORE).roll(-1, 1)

    def run(flat: bool, scored):
        language.zero_grad()
        language._flat = flat
        hidden = language(language.embed(tokens), tokens, scored=scored)[read]
        loss = hidden.square().sum() + hidden.sum()
        loss.backward()
        return hidden, {
            n: p.grad.clone() for n, p in language.named_parameters() if p.grad is not None
        }

    reference, expected = run(False, None)
    for scored in (None, read):
        hidden, gradients = run(True, scored)
        torch.testing.assert_close(hidden, reference, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            scale = expected[name].abs().max().clamp_min(1)
            torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_block_mask_of_gpus_gives_the_states_of_the_dense_mask(kind, monkeypatch):
    tokens, language = rows(), decoder(kind)
    read = (tokens.labels != IGNORE).roll(-1, 1)
    embeds = language.embed(tokens)
    language._flat = False
    expected = language(embeds, tokens)
    language._flat = True
    monkeypatch.setattr(block_mask, "suits", lambda *_: True)
    calls = []
    attend = block_mask.Blocks.attend
    monkeypatch.setattr(
        block_mask.Blocks, "attend", lambda *args: calls.append(args) or attend(*args)
    )
    # the kernel is compiled on GPUs alone, and has no backward pass elsewhere
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        whole = language(embeds, tokens)[tokens.mask]
        few = language(embeds, tokens, scored=read)[read]
    torch.testing.assert_close(whole, expected[tokens.mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few, expected[read], rtol=1e-5, atol=1e-5)
    assert [args[2].shape[2] for args in calls] == [25, 25, 25, int(read.sum())]


def test_the_block_mask_sees_what_the_dense_mask_sees():
    from torch.nn.attention.flex_attention import create_mask

    from triptych.parts.attention import visible

    torch.manual_seed(2)
    segments = torch.randint(PAD, 4, (5, 150))  # samples that interleave, and padding anywhere
    tokens = Tokens(segments, segments, segments)
    dense = visible(tokens, "causal")
    real = tokens.mask.flatten().nonzero()[:, 0]
    expected = torch.block_diag(*dense).bool()[real][:, real]
    blocks = block_mask.Blocks.of(tokens)
    sizes = (1, 1, len(real), len(real))
    assert torch.equal(create_mask(blocks.mask.mask_mod, *sizes, device="cpu")[0, 0], expected)
    few = blocks.at(torch.tensor([3, 200, 301]))
    seen = create_mask(few.mask.mask_mod, 1, 1, 3, len(real), device="cpu")[0, 0]
    assert torch.equal(seen, expected[[3, 200, 301]])
    assert blocks.mask.sparsity() > 50  # % of blocks skipped: rows do not pay for each other


def test_the_block_mask_is_for_newer_gpus_and_decoders_it_fits(monkeypatch):
    gpu, config = torch.device("cuda"), decoder("llama").config
    config.head_dim = 64
    monkeypatch.setattr(block_mask, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert block_mask.suits(config, gpu) and not block_mask.suits(config, torch.device("cpu"))
    config.attention_dropout = 0.1
    assert not block_mask.suits(config, gpu)
    config.attention_dropout, config.head_dim = 0.0, 8
    assert not block_mask.suits(config, gpu)
    config.head_dim = 64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not block_mask.suits(config, gpu)


def test_the_last_block_works_on_the_read_positions_alone():
    tokens, language = rows(), decoder("llama")
    seen = []
    language.blocks[-1].mlp.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    read = (tokens.labels != IGNORE).roll(-1, 1)
    language(language.embed(tokens), tokens, scored=read)
    language(language.embed(tokens), tokens)
    assert seen == [int(read.sum()), int(tokens.mask.sum())]


def test_checkpointed_blocks_still_give_the_same_gradients():
    tokens, language = rows(), decoder("llama")
    read = (tokens.labels != IGNORE).roll(-1, 1)

    def gradients():
        language.zero_grad()
        language(language.embed(tokens), tokens, scored=read)[read].square().sum().backward()
        return [p.grad.clone() for p in language.parameters() if p.grad is not None]

    language.train()
    plain = gradients()
    language.model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(gradients(), plain, strict=True):
        scale = other.abs().max().clamp_min(1)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-5)


def test_rows_longer_than_the_window_keep_the_dense_mask():
    language = decoder("mistral")
    language.config.sliding_window = 5
    assert not flat_rows.fits(language.config, rows())


def test_capped_attention_is_left_to_the_library():
    sizes = {**DECODERS["llama"], "head_dim": 8, "model_type": "gemma2"}
    assert not LanguageModel(config=sizes)._flat


@pytest.mark.parametrize("bias", [False, True])
def test_thin_lora_gives_pefts_outputs_and_gradients(bias):
    from peft import LoraConfig, inject_adapter_in_model

    from triptych.parts.thin_lora import ThinLinear, thin

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias)).double()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, model).double()
    model[0].base_layer.requires_grad_(False)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)

    def run():
        model.zero_grad()
        x.grad = None
        out = model(x)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = [t.clone() for t in run()]
    thin(model)
    assert type(model[0]) is ThinLinear
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other)
    model[0]._disable_adapters = True
    torch.testing.assert_close(model(x), model[0].base_layer(x))


def test_next_token_asks_only_for_the_states_it_scores(vlm, dialogue):
    asked = []
    forward = vlm.language.forward

    def watching(*args, scored=None, **kwargs):
        asked.append(scored)
        return forward(*args, scored=scored, **kwargs)

    vlm.language.forward = watching
    batch = vlm.processor().rows(
        [[dialogue(("what color?", "red"), name=f"q{i}") for i in range(3)]]
    )
    objective = NextToken()
    objective(vlm, batch)
    assert int(asked[0].sum()) == objective.counts(batch)["next_token"]

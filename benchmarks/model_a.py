"""The generative model of the benchmarks, on both sides with the same weights.

LLaVA from a configuration: CLIP vision of 6 x 256 at 64 px with patches of 8, Llama of 6 x 512 with
a vocabulary of 32,000 trained here, LoRA r=16 on every linear layer of the decoder, the projector
trained, the vision tower frozen.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.types import ImageRef, Sample, assistant, user

SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = ["the", "a", "of", "shape", "color", "circle", "red", "green", "is", "there", "in", "image"]
LINEAR, LORA, HEAD = 19.0e6, 0.94e6, 16.4e6  # weights of the decoder, its adapters, its head
IMAGE, PROJECTED = 613e6, 151e6  # FLOP of an image encoded, and projected (forward and backward)
LAST = LINEAR / 6 * (1 - 3 / 12.1)  # of the last block, what only read positions need (Q, O, MLP)


def folder() -> Path:
    """The model with its processor as the library saves it; made once, from a seed."""
    made = Path(tempfile.gettempdir()) / "triptych-benchmark-a-1"
    if not (made / "model.safetensors").exists():
        _make(made)
    return made


def _make(path: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_center_crop=True
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "template.jinja").write_text(TEMPLATE)
    model.save_pretrained(path)


def _tokenizer() -> Any:
    """A byte-level BPE of 32,000 entries, trained on invented words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
    invented = ("".join(letters.choices(syllables, k=letters.randint(2, 5))) for _ in range(60000))
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator([*(" ".join(WORDS) for _ in range(9)), *invented], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.chat_template = TEMPLATE
    return made


def easy_groups(images: int, each: int = 10) -> list[list[Sample]]:
    """`each` questions of each of `images` easy-VQA pictures."""
    from triptych.data.readers import EasyVQA

    reader, groups = EasyVQA("train"), {}
    for index, cluster in enumerate(reader.clusters):
        groups.setdefault(cluster, []).append(index)
    full = [g[:each] for g in groups.values() if len(g) >= each][:images]
    return [[reader[i] for i in group] for group in full]


def varied_groups(samples: int, each: int) -> list[list[Sample]]:
    """Dialogues of lognormal length, 5 to 300 tokens of text, `each` of them on an image."""
    from triptych.data.readers import EasyVQA

    chance, reader = random.Random(1), EasyVQA("train")
    names = list(dict.fromkeys(reader.clusters))
    refs = {}
    for index, cluster in enumerate(reader.clusters):
        if len(refs) < samples // each:
            refs.setdefault(cluster, reader[index].images[0])
    pictures: list[ImageRef] = [refs[n] for n in names[: samples // each]]
    groups = []
    for number, picture in enumerate(pictures):
        group = []
        for k in range(each):
            length = min(300, max(5, round(chance.lognormvariate(4.0, 0.9))))
            asked = max(2, round(length * chance.uniform(0.3, 0.7)))
            question, answer = (
                " ".join(chance.choices(WORDS, k=n)) for n in (asked, max(2, length - asked))
            )
            messages = [user(question, 1), assistant(answer)]
            name = f"varied/{number}/{k}"
            group.append(Sample(messages, [picture], id=name, cluster=f"image {number}"))
        groups.append(group)
    return groups


def library() -> nn.Module:
    """The library's class with peft's adapters: what people train today."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder(), attn_implementation="sdpa")
    wanted = rf".*language_model.*\.({'|'.join(TARGETS)})"
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=wanted)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    same_adapters(model)
    return model.train()


def ours(lora: bool = True) -> Any:
    """The same weights as this project's model, its parts table applied."""
    from peft import LoraConfig

    from triptych.adapt import Quantization, adapt
    from triptych.interop import from_hf
    from triptych.table import merge

    model = from_hf(str(folder()), template=TEMPLATE)
    family = {"vision": "frozen", "connector": "full", "language": "full"}
    preset = {"language": "lora"} if lora else {}
    table = merge(model, family, preset, {}, [], ("benchmark", "benchmark"))
    adapt(model, table, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0), Quantization())
    same_adapters(model)
    return model


def same_adapters(model: nn.Module) -> None:
    """Fill A and B of every adapter from its layer's name, alike on both sides."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name[name.index("layers.") :]
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
            random_state = torch.Generator().manual_seed(seed)
            values = torch.randn(parameter.shape, generator=random_state) * 0.02
            parameter.data.copy_(values if "lora_A" in name else 0.1 * values)


def records(groups: list[list[Sample]]) -> list[dict]:
    """The samples in the layout of prompt and completion, as text."""
    rows = []
    for sample in (s for group in groups for s in group):
        asked = sample.messages[0]["content"][-1]["text"]
        answer = sample.messages[1]["content"][0]["text"]
        prompt = f"<bos><|user|><image>\n{asked}<|end|><|assistant|>"
        rows.append(
            {"images": [sample.images[0]], "prompt": prompt, "completion": f"{answer}<|end|>"}
        )
    return rows

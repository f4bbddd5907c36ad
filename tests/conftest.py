"""Tiny random models, built from configs and saved to a temporary folder; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import tiny_llama
import torch

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "what color is the shape? red green blue black gray teal brown yellow",
    "is there a circle in the image? yes no triangle rectangle",
    "describe the picture: two small circles left of a large square.",
]


@pytest.fixture(scope="session", autouse=True)
def quiet_threads() -> None:
    torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on three lines, with roles and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<|end|>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """A folder with `vision` (CLIP ViT) and `language` (Llama) of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    language = LlamaConfig(**tiny_llama.fields(tokenizer, intermediate_size=128))
    model = LlamaForCausalLM(language)
    with torch.no_grad():  # large enough that answers differ between prompts
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return folder


@pytest.fixture
def vlm(tiny):
    """A LLaVA-shaped model over the tiny parts."""
    from functools import partial

    from triptych.models.fusion import Prefix
    from triptych.models.vlm import VLM
    from triptych.parts.connector import MLPConnector
    from triptych.parts.language import LanguageModel
    from triptych.parts.vision import VisionEncoder

    torch.manual_seed(1)
    vision = VisionEncoder(str(tiny / "vision"), layer=-2)
    language = LanguageModel(str(tiny / "language"))
    return VLM(vision, partial(MLPConnector, depth=2), language, Prefix())


@pytest.fixture(scope="session")
def pictures():
    """Four different pictures of 32 px, as references."""
    from PIL import Image

    from triptych.types import ImageRef

    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return [
        ImageRef.from_picture(Image.fromarray(a.numpy()), f"picture {i}")
        for i, a in enumerate(arrays)
    ]


@pytest.fixture
def dialogue(pictures):
    """A function that makes samples: questions and answers over chosen pictures."""
    from triptych.types import Sample, assistant, user

    def make(*turns: tuple[str, str], images: tuple[int, ...] = (0,), name: str = "s") -> Sample:
        messages = []
        for i, (question, answer) in enumerate(turns):
            messages += [user(question, len(images) if i == 0 else 0), assistant(answer)]
        refs = [pictures[i] for i in images]
        return Sample(messages, refs, id=name, cluster=str(images))

    return make


@pytest.fixture(scope="session")
def dual_batch():
    """A function that makes a contrastive batch of images and captions, one row a pair."""
    from triptych.types import Batch, Sample

    def make(images, tokens):
        rows = len(tokens.ids)
        slots = torch.tensor([[i, i, 1] for i in range(rows)])
        return Batch(images, slots, {"text": tokens}, [Sample([], id=str(i)) for i in range(rows)])

    return make

"""Small random folders of library models: weights, processor, tokenizer and template, made here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tiny_llama
import torch

CORPUS = [
    "what color is the shape? red green blue black gray teal brown yellow",
    "is there a circle in the image? yes no triangle rectangle",
    "You are a helpful assistant. user assistant User Assistant system",
]
# As the checkpoints' own templates are written: content in parts, no generation marks.
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SMOL = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
SMOL += ["<global-img>", "<video>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GEMMA = ["<pad>", "<eos>", "<bos>", "<image>"]


def tokenizer(special: list[str], **named: str):
    """A byte-level BPE tokenizer with these special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **named)


def qwen(folder: Path) -> None:
    """Qwen2.5-VL: dynamic sizes, M-RoPE, the connector (merger) inside the encoder."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer(QWEN, eos_token="<|im_end|>")
    ids = words.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **tiny_llama.fields(words, bos_token_id=None),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    sizes = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        words,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    )
    _save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def smolvlm(folder: Path) -> None:
    """SmolVLM: images in tiles, padded to the most images of a row, with a pixel mask."""
    _shuffled("SmolVLM", folder)


def idefics3(folder: Path) -> None:
    """Idefics3: patches shuffled into the width, as SmolVLM has it; it reads no videos."""
    _shuffled("Idefics3", folder)


def _shuffled(name: str, folder: Path) -> None:
    import transformers

    library = partial(getattr, transformers)
    words = tokenizer(SMOL, eos_token="<end_of_utterance>", bos_token="<|im_start|>")
    config = library(f"{name}Config")(
        text_config={"model_type": "llama", **tiny_llama.fields(words)},
        vision_config=SIGLIP,
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    videos = library(f"{name}VideoProcessor", None)
    processor = library(f"{name}Processor")(
        library(f"{name}ImageProcessor")(**sizes, do_image_splitting=False),
        words,
        *([videos(**sizes)] if videos else []),
        image_seq_len=4,
        chat_template=SMOL_TEMPLATE,
    )
    _save(folder, library(f"{name}ForConditionalGeneration")(config), processor)


def paligemma(folder: Path) -> None:
    """PaliGemma: no template; a bidirectional prefix of image and question, a causal suffix."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    words = tokenizer(GEMMA, eos_token="<eos>", bos_token="<bos>")
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, words)  # adds its location tokens
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            **tiny_llama.fields(words, head_dim=16),
        },
        vision_config={
            **SIGLIP,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        projection_dim=64,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    _save(folder, PaliGemmaForConditionalGeneration(config), processor)


def idefics(folder: Path) -> None:
    """The first Idefics: gated layers, a resampler, and tokens that have tables of their own."""
    from transformers import (
        IdeficsConfig,
        IdeficsForVisionText2Text,
        IdeficsImageProcessor,
        IdeficsProcessor,
    )

    words = tokenizer(["<pad>", "<s>", "</s>"], eos_token="</s>", bos_token="<s>")
    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    words.add_special_tokens({"additional_special_tokens": more})
    own = tiny_llama.fields(words, vocab_size=len(words) - len(more))
    own.pop("num_key_value_heads")
    config = IdeficsConfig(
        **own,
        additional_vocab_size=len(more),
        qk_layer_norms=True,
        alpha_initializer="normal",
        alphas_initializer_range=0.5,
        alpha_type="vector",
        use_resampler=True,
        vision_config={
            "embed_dim": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "qk_layer_norms_perceiver": True,
        },
    )
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=32), words)
    _save(folder, IdeficsForVisionText2Text(config), processor)


def idefics2(folder: Path) -> None:
    """Idefics2: a resampler, pictures of their own sizes, and a processor of the older kind."""
    from transformers import (
        Idefics2Config,
        Idefics2ForConditionalGeneration,
        Idefics2ImageProcessor,
        Idefics2Processor,
    )

    words = tokenizer(SMOL, eos_token="<end_of_utterance>", bos_token="<|im_start|>")
    config = Idefics2Config(
        text_config={"model_type": "mistral", **tiny_llama.fields(words)},
        vision_config=SIGLIP,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    images = Idefics2ImageProcessor(
        size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
    )
    processor = Idefics2Processor(images, words, image_seq_len=4, chat_template=SMOL_TEMPLATE)
    _save(folder, Idefics2ForConditionalGeneration(config), processor)


BUILDERS = {"qwen2_5_vl": qwen, "smolvlm": smolvlm, "paligemma": paligemma}


def build_all(folder: Path) -> dict[str, Path]:
    """One folder a model, by name."""
    for name, builder in BUILDERS.items():
        torch.manual_seed(0)
        builder(folder / name)
    return {name: folder / name for name in BUILDERS}


def _save(folder: Path, model: torch.nn.Module, processor: object) -> None:
    with torch.no_grad():  # large enough that untrained answers differ between prompts
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2 if "embed" in name or "head" in name else 8)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

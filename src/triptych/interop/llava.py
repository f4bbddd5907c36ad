"""LLaVA-1.5 (arXiv 2310.03744) as `LlavaForConditionalGeneration` writes it."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from triptych.data.transforms import ImageTransform
from triptych.interop.official import Official, Source
from triptych.models.fusion import Prefix
from triptych.models.vlm import VLM
from triptych.parts.connector import MLPConnector
from triptych.parts.language import LanguageModel, load_tokenizer
from triptych.parts.vision import VisionEncoder
from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
TEMPLATE = "assets/templates/vicuna.jinja"  # of every official LLaVA-1.5
PREFIXES = {
    "model.vision_tower.": "vision.model.",
    "model.multi_modal_projector.linear_1.": "connector.layers.0.",
    "model.multi_modal_projector.linear_2.": "connector.layers.2.",
    "model.language_model.": "language.model.model.",
    "lm_head.": "language.model.lm_head.",
}
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def build(config: LlavaConfig, source: Source) -> VLM:
    """The parts of this configuration, without weights."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise TriptychError(
            f"'{source.path}' joins the vision layers {layer}, and a vision encoder here gives "
            "one; use model=hf for this checkpoint."
        )
    if config.projector_hidden_act != "gelu":
        raise TriptychError(
            f"'{source.path}' has a projector with {config.projector_hidden_act}, and MLPConnector "
            "has gelu; use model=hf for this checkpoint."
        )
    built = {"attention": source.attention, "dtype": source.dtype}
    vision = VisionEncoder(
        config=config.vision_config.to_dict(),
        layer=layer,
        select="patch" if strategy == "default" else "cls_patch",
        transform=ImageTransform.of(source.path, config.vision_config),
        **built,
    )
    if vision.special != (strategy == "default"):
        raise TriptychError(
            f"'{source.path}' drops the first vision token of a tower with {vision.special} class "
            "tokens; use model=hf for this checkpoint."
        )
    language = LanguageModel(
        config=config.text_config.to_dict(),
        tokenizer=source.path,
        template=source.template or _template(source),
        revision=source.revision,
        implementation=source.attention,
        dtype=source.dtype,
    )
    return VLM(vision, partial(MLPConnector, depth=2), language, Prefix())


def fits(model: torch.nn.Module) -> bool:
    """A VLM with the image as a prefix behind an MLP of two layers."""
    return (
        type(model) is VLM
        and isinstance(model.fusion, Prefix)
        and isinstance(model.connector, MLPConnector)
        and len(model.connector.layers) == 3
        and model.connector.shuffle == 1
    )


def describe(model: VLM) -> LlavaConfig:
    """The official configuration; the image token gets an id behind the tokenizer's own."""
    from transformers import LlavaConfig

    if model.official is not None:
        return deepcopy(model.official)
    if model.vision.special not in (0, 1):
        raise TriptychError(
            "LlavaForConditionalGeneration drops one class token and this vision encoder has "
            f"{model.vision.special} to drop; set model.vision.select=cls_patch and train again."
        )
    text, vision = deepcopy(model.language.config), model.vision
    rows = model.language.model.get_input_embeddings().num_embeddings
    tokenizer = with_image_token(model.language)
    image = rows if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text.vocab_size = max(rows, image + 1)
    return LlavaConfig(
        vision_config=deepcopy(vision.config),
        text_config=text,
        image_token_index=image,
        image_seq_length=model.placeholders(*vision.transform.size),
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy="default" if vision.special else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def finish(tensors: dict[str, Tensor], config: LlavaConfig) -> dict[str, Tensor]:
    """Give the vocabulary its row for the image token: the mean, which is never the arg max."""
    rows = config.text_config.vocab_size
    for name in VOCABULARY:
        table = tensors.get(name)
        if table is not None and len(table) < rows:
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            more = mean.expand(rows - len(table), *table.shape[1:])
            tensors[name] = torch.cat([table, more])
    return tensors


def extras(model: VLM, config: LlavaConfig, folder: str) -> None:
    """Write the processor, so that the folder also works without this project."""
    from transformers import LlavaProcessor

    tokenizer = with_image_token(model.language)
    images = model.vision.transform.to_library()
    if tokenizer is None:
        images.save_pretrained(folder)
        return
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
    ).save_pretrained(folder)


def with_image_token(language: LanguageModel) -> PreTrainedTokenizerBase | None:
    """A copy of the tokenizer that knows `<image>`; None if the model has no tokenizer."""
    try:
        tokenizer = deepcopy(language.tokenizer)
    except (OSError, ValueError, TriptychError):
        return None
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def _template(source: Source) -> str | None:
    """LLaVA's own template, unless the checkpoint's reads turns that are plain strings."""
    try:
        stated = load_tokenizer(source.path, revision=source.revision).chat_template
    except (OSError, ValueError):
        return None
    lists = stated is None or "'type'" in stated or '"type"' in stated or ".type" in stated
    return TEMPLATE if lists else None


LLAVA = Official("LlavaForConditionalGeneration", PREFIXES, build, describe, fits, finish, extras)

"""BLIP-2 and InstructBLIP in the layout of transformers, to our parts and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from triptych.data.transforms import ImageTransform
from triptych.interop.official import Official, Source, came_from, kept_config, save_sides
from triptych.interop.prefixes import load, to_ours, to_theirs
from triptych.models.fusion import Prefix
from triptych.models.vlm import VLM
from triptych.parts.language import LanguageModel
from triptych.parts.qformer import InstructQFormer, QFormer
from triptych.parts.seq2seq import Seq2SeqModel
from triptych.parts.vision import VisionEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARED_ROWS = (
    ("vision_model.post_layernorm.", "connector.norm."),  # LAVIS calls it ln_vision
    ("vision_model.", "vision.model."),
    ("query_tokens", "connector.queries"),
    ("qformer.", "connector.qformer."),
    ("language_projection.", "connector.proj."),
    ("language_model.", "language.model."),
)
TEXT_ROWS = (
    ("qformer.embeddings.layernorm.", "connector.qformer.layernorm."),
    ("qformer.embeddings.", "connector.embeddings."),
)
# these checkpoints bring no chat template: words, then the answer and its end
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NEVER_RUN = ("vision.model.post_layernorm.",)  # the tower's own copy; the connector's is used


def table(config: PreTrainedConfig) -> tuple[tuple[str, str], ...]:
    """The prefix table of a BLIP-2 or InstructBLIP configuration."""
    return SHARED_ROWS + (TEXT_ROWS if config.model_type == "instructblip" else ())


def build(
    config: PreTrainedConfig,
    tokenizer: str | None = None,
    reader: str | None = None,
    implementation: str = "sdpa",
    transform: ImageTransform | None = None,
    template: str | None = None,
) -> VLM:
    """The same architecture from our parts, with random weights.

    tokenizer: of the language model. reader: of the Q-Former that reads the instruction.
    """
    text, vision_config = config.text_config, config.vision_config
    instruct = config.model_type == "instructblip"
    vision = VisionEncoder(
        config=fields_of(vision_config),
        model_class=f"transformers.{'InstructBlip' if instruct else 'Blip2'}VisionModel",
        layer=-1,
        select="cls_patch",
        attention=implementation,
        transform=transform or ImageTransform((vision_config.image_size,) * 2),
    )
    names = ("model_type", "encoder_hidden_size", "use_qformer_text_input")
    q = {k: v for k, v in fields_of(config.qformer_config).items() if k not in names}
    settings: dict[str, Any] = {
        "queries": config.num_query_tokens,
        "config": q,
        "norm_eps": vision_config.layer_norm_eps,
        "implementation": implementation,
    }
    if instruct:
        connector = partial(
            InstructQFormer, reader={"tokenizer": reader, "max_length": 128}, **settings
        )
    else:
        connector = partial(QFormer, **settings)
    kind = Seq2SeqModel if text.is_encoder_decoder else LanguageModel
    language = kind(
        config=fields_of(text),
        tokenizer=tokenizer,
        template=template,
        implementation=implementation,
    )
    return VLM(vision, connector, language, Prefix())


def from_hf(
    config: PreTrainedConfig, state: dict[str, Tensor], source: str = "the checkpoint", **parts: Any
) -> VLM:
    """A published checkpoint's tensors in our parts; `parts` go to `build`."""
    model = build(config, **parts)
    load(model, to_ours(state, table(config), source), source, NEVER_RUN)
    return model


def to_hf(model: VLM, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The tensors under the published names, ready for the library's own class."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(NEVER_RUN)}
    return to_theirs(state, table(config), "this model")


def open_parts(config: PreTrainedConfig, source: Source) -> VLM:
    """The architecture with what stands beside a checkpoint's weights: tokenizers, transform."""
    return build(config, **_beside(config, source))


def read(config: PreTrainedConfig, state: dict[str, Tensor], source: Source) -> VLM:
    """A checkpoint's tensors and what stands beside them."""
    return from_hf(config, state, f"the checkpoint '{source.path}'", **_beside(config, source))


def _beside(config: PreTrainedConfig, source: Source) -> dict[str, Any]:
    reader = Path(source.path) / "qformer_tokenizer"  # of InstructBLIP
    return {
        "tokenizer": source.path,
        "reader": str(reader) if reader.is_dir() else source.path,
        "implementation": source.attention,
        "transform": ImageTransform.of(source.path, config.vision_config),
        "template": source.template or TEMPLATE,
    }


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration states, as keyword arguments."""
    skip = ("transformers_version", "architectures", "_name_or_path")
    return {k: v for k, v in config.to_dict().items() if k not in skip}


OFFICIAL = {
    name: Official(
        name,
        {},
        open_parts,
        kept_config,
        came_from(name),
        extras=save_sides,
        read=read,
        write=to_hf,
    )
    for name in ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
}

"""BLIP's three published heads and BLIP-2's first stage, to our FusionEncoder and back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from triptych.data.transforms import ImageTransform
from triptych.interop.blip2 import NEVER_RUN, fields_of
from triptych.interop.official import Official, Source, came_from, kept_config, save_sides
from triptych.interop.prefixes import Table, load, to_ours, to_theirs
from triptych.models.fusion_encoder import FusionEncoder, MatchHeads
from triptych.parts.cross_text import ApartCrossText, CrossText
from triptych.parts.qformer import PairQFormer
from triptych.parts.vision import VisionEncoder
from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VISION = (
    ("vision_model.post_layernorm.", "connector.norm."),
    ("vision_model.", "vision.model."),
)
ENCODER = (("text_encoder.", "connector.encoder."),)
DECODER = (("text_decoder.", "connector.decoder."),)


class Layout(NamedTuple):
    """A published class: its table, and which of our tensors it does not hold."""

    table: Table
    without: tuple[str, ...]


LAYOUTS = {
    "BlipForImageTextRetrieval": Layout(
        VISION
        + ENCODER
        + (
            ("vision_proj.", "heads.vision."),
            ("text_proj.", "heads.text."),
            ("itm_head.", "heads.match."),
        ),
        ("connector.decoder.", "heads.logit_scale"),
    ),
    "BlipForConditionalGeneration": Layout(VISION + DECODER, ("connector.encoder.", "heads.")),
    "BlipForQuestionAnswering": Layout(VISION + ENCODER + DECODER, ("heads.",)),
    "Blip2ForImageTextRetrieval": Layout(
        VISION
        + (
            ("query_tokens", "connector.queries"),
            ("embeddings.", "connector.embeddings."),
            ("qformer.", "connector.qformer."),
            ("vision_projection.", "heads.vision."),
            ("text_projection.", "heads.text."),
            ("itm_head.", "heads.match."),
        ),
        ("connector.lm.", "heads.logit_scale"),
    ),
}


def layout(kind: str) -> Layout:
    """The layout of a published class by its name."""
    if kind not in LAYOUTS:
        raise TriptychError(f"'{kind}' has no layout here; there are {', '.join(LAYOUTS)}.")
    return LAYOUTS[kind]


def build(
    kind: str,
    config: PreTrainedConfig,
    tokenizer: str | None = None,
    starts: dict[str, str] | None = None,
    implementation: str = "sdpa",
    transform: ImageTransform | None = None,
) -> FusionEncoder:
    """The same architecture from our parts, with random weights."""
    tower, second = config.vision_config, kind.startswith("Blip2")
    vision = VisionEncoder(
        config=fields_of(tower),
        model_class=f"transformers.{'Blip2' if second else 'Blip'}VisionModel",
        layer=-1,
        select="cls_patch",
        attention=implementation,
        transform=transform or ImageTransform((tower.image_size,) * 2),
    )
    text: dict[str, Any] = {
        "norm_eps": tower.layer_norm_eps,
        "tokenizer": tokenizer,
        "starts": starts,
    }
    if second:
        names = ("model_type", "encoder_hidden_size", "use_qformer_text_input")
        own = {k: v for k, v in fields_of(config.qformer_config).items() if k not in names}
        eps = text.pop("norm_eps")
        connector = partial(
            PairQFormer,
            queries=config.num_query_tokens,
            config=own,
            norm_eps=eps,
            implementation=implementation,
            reader=text,
        )
    else:
        names = ("model_type", "encoder_hidden_size", "is_decoder")
        own = {k: v for k, v in fields_of(config.text_config).items() if k not in names}
        part = ApartCrossText if kind == "BlipForQuestionAnswering" else CrossText
        connector = partial(part, config=own, **text)
    heads = partial(MatchHeads, dim=config.image_text_hidden_size)
    return FusionEncoder(vision, connector, heads)


def from_hf(
    kind: str,
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    source: str = "the checkpoint",
    **parts: Any,
) -> FusionEncoder:
    """A published checkpoint's tensors in our parts; what its class lacks stays random."""
    rows = layout(kind)
    model = build(kind, config, **parts)
    load(model, to_ours(state, rows.table, source), source, (*NEVER_RUN, *rows.without))
    return model


def to_hf(kind: str, model: FusionEncoder) -> dict[str, Tensor]:
    """The tensors a published class holds, under its names; teacher and queue are left out."""
    rows = layout(kind)
    left = (*NEVER_RUN, *rows.without, "momentum.")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(left)}
    return to_theirs(state, rows.table, "this model")


def _official(kind: str) -> Official:
    def read(config: PreTrainedConfig, state: dict[str, Tensor], source: Source) -> FusionEncoder:
        what = f"the checkpoint '{source.path}'"
        return from_hf(kind, config, state, what, **_beside(kind, config, source))

    def open_parts(config: PreTrainedConfig, source: Source) -> FusionEncoder:
        return build(kind, config, **_beside(kind, config, source))

    def write(model: FusionEncoder, config: PreTrainedConfig) -> dict[str, Tensor]:
        return to_hf(kind, model)

    return Official(
        kind,
        {},
        open_parts,
        kept_config,
        came_from(kind),
        extras=save_sides,
        read=read,
        write=write,
    )


def _beside(kind: str, config: PreTrainedConfig, source: Source) -> dict[str, Any]:
    """Tokenizer and transform; BLIP's decoder begins with [DEC], the first id behind BERT's."""
    return {
        "tokenizer": source.path,
        "starts": None if kind.startswith("Blip2") else {"write": "[DEC]"},
        "implementation": source.attention,
        "transform": ImageTransform.of(source.path, config.vision_config),
    }


OFFICIAL = {kind: _official(kind) for kind in LAYOUTS}

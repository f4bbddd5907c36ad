"""Where the roles are inside the image-text-to-text classes of transformers: one table.

The library names an image encoder and a decoder in almost every class, and what remains is the
connector. The table holds what differs: connectors inside the encoder, and odd names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Places(NamedTuple):
    """Module paths by role, from the class's root; an empty one is found by the library's names."""

    vision: tuple[str, ...] = ()
    connector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


# The merger that brings patches to the decoder's width is built into the encoder.
MERGER = Places(connector=("model.visual.merger",))
DEEPSTACK = Places(connector=("model.visual.merger", "model.visual.deepstack_merger_list"))

PLACES: dict[str, Places] = {  # by config.model_type
    "blip": Places(language=("text_decoder",)),
    "deepseek_vl_hybrid": Places(vision=("model.vision_model", "model.high_res_vision_model")),
    "glm4v": MERGER,
    "glm4v_moe": MERGER,
    "glm46v": MERGER,
    "glm_ocr": MERGER,
    # one module holds the decoder, its gated layers and the image encoder
    "idefics": Places(vision=("model.vision_model",), language=("model.layers", "model.norm")),
    "instructblip": Places(language=("language_model",)),
    "qwen2_vl": MERGER,
    "qwen2_5_vl": MERGER,
    "qwen3_5": MERGER,
    "qwen3_5_moe": MERGER,
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": DEEPSTACK,
    "video_llava": Places(vision=("model.image_tower", "model.video_tower")),
}

# Classes that leave out the scale of the logits that their decoder's config states.
UNSCALED = ("aya_vision", "cohere2_vision")


def find_roles(library: PreTrainedModel) -> dict[str, list[str]]:
    """Role -> paths of modules, parameters and buffers; each tensor has exactly one role."""
    anchors = _anchors(library)
    found: dict[str, list[str]] = {"vision": [], "connector": [], "language": []}
    for path in _parts(library, "", anchors):
        holders = [a for a in anchors if path == a or path.startswith(a + ".")]
        found[anchors[max(holders, key=len)] if holders else "connector"].append(path)
    return found


def reach(module: nn.Module, path: str) -> nn.Module | Tensor:
    """The module, parameter or buffer of this dotted name."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _anchors(library: PreTrainedModel) -> dict[str, str]:
    """Path -> role, by the table or else by the names the library itself looks for."""
    names = {id(module): name for name, module in library.named_modules()}
    places = PLACES.get(library.config.model_type, Places())
    encoder = library.get_encoder(modality="image")
    vision = places.vision or _below(names.get(id(encoder), ""))
    language = places.language or _below(names.get(id(library.get_decoder()), ""))
    if not language or any(v.startswith(text + ".") for v in vision for text in language):
        raise TriptychError(
            f"{type(library).__name__} has no decoder apart from its image encoder, so its parts "
            "cannot be told apart; add its paths to triptych.interop.hosted_roles.PLACES."
        )
    tables = [library.get_input_embeddings(), library.get_output_embeddings()]
    ends = tuple(names[id(module)] for module in tables if module is not None)
    anchors = dict.fromkeys(vision, "vision") | dict.fromkeys((*language, *ends), "language")
    return anchors | {path: "connector" for path in places.connector if path in names.values()}


def _below(name: str) -> tuple[str, ...]:
    # the library returns a base model where it knows no encoder or decoder
    return (name,) if name not in ("", "model") else ()


def _parts(module: nn.Module, path: str, anchors: dict[str, str]) -> list[str]:
    """The largest subtrees that no anchor divides, in reading order."""
    if path and not any(anchor.startswith(path + ".") for anchor in anchors):
        return [path]
    if path in anchors and all(
        anchors[a] == anchors[path] for a in anchors if a.startswith(path + ".")
    ):
        return [path]
    prefix = f"{path}." if path else ""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    parts = [prefix + name for name, _ in own]
    for name, child in module.named_children():
        parts += _parts(child, prefix + name, anchors)
    return parts

"""Between a folder or hub id of transformers and a model of ours, in both directions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from triptych.interop import blip, blip2, dual
from triptych.interop.llava import LLAVA
from triptych.interop.official import Official, Source, listed, load_exactly, renamed, tie
from triptych.models.base import Model
from triptych.parts.language import LanguageModel
from triptych.parts.pretrained import checkpoint_config, resolve
from triptych.parts.vision import VisionEncoder
from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# by the class that a config.json states, else by its model_type
OFFICIAL: dict[str, Official] = {
    "llava": LLAVA,
    **dual.OFFICIAL,
    **blip.OFFICIAL,
    **blip2.OFFICIAL,
}


def from_hf(
    path: str | Path,
    revision: str | None = None,
    template: str | None = None,
    attention: str = "sdpa",
    dtype: str = "float32",
) -> Model | VisionEncoder | LanguageModel:
    """A ready model from an official checkpoint of a family in OFFICIAL, or one part alone.

    path: a folder or hub id. A vision tower's checkpoint (CLIP, SigLIP, DINOv2 ...) gives a
    VisionEncoder, a causal language model's a LanguageModel. A tensor that either side lacks is an
    error that names it. template: a chat template in place of the checkpoint's.
    Also a `_target_`: `model._target_=triptych.interop.from_hf`.
    """
    source = Source(str(path), revision, template, attention, dtype)
    config = checkpoint_config(source.path, revision)
    family = OFFICIAL.get((config.architectures or [""])[0]) or OFFICIAL.get(config.model_type)
    if family is not None:
        return _load(family, config, source)
    weights = {"weights": source.path, "revision": revision, "dtype": dtype}
    kind = _kind(config)
    if kind == "language":
        return LanguageModel(**weights, template=template, implementation=attention)
    if kind == "vision":
        return VisionEncoder(**weights, attention=attention)
    raise TriptychError(
        f"'{path}' is a {config.model_type}, for which there is no prefix table (there are "
        f"{', '.join(OFFICIAL)}, vision towers and causal language models); use model=hf "
        f"model.id={path}."
    )


def to_hf(model: Model | VisionEncoder | LanguageModel, folder: str | Path) -> Path:
    """Write a model, or one part, as the official folder that `from_pretrained` loads.

    Adapters have to be merged first (`python -m triptych.interop export`). Written to the side and
    moved into place; a folder that holds files is refused.
    """
    folder = Path(folder)
    refuse_used(folder)
    adapted = [n for n, p in model.named_parameters() if ".lora_" in n or hasattr(p, "quant_state")]
    if adapted:
        raise TriptychError(
            f"the model has adapters or quantized weights ({adapted[0]}), which no official format "
            "holds; merge them with python -m triptych.interop export run=DIR to=DIR."
        )
    side = folder.with_name(folder.name + ".writing")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    if isinstance(model, VisionEncoder):
        model.model.save_pretrained(side)
        model.transform.to_library().save_pretrained(side)
    elif isinstance(model, LanguageModel):
        model.model.save_pretrained(side)
        if model.has_tokenizer:
            model.tokenizer.save_pretrained(side)
    else:
        _save(_family(model), model, side)
    if folder.exists():
        folder.rmdir()  # it is empty
    side.rename(folder)
    return folder


def fitting(model: nn.Module) -> Official | None:
    """The official family that can hold this model, if any."""
    return next((family for family in OFFICIAL.values() if family.fits(model)), None)


def refuse_used(folder: Path) -> None:
    """Raise TriptychError if the folder is a file or holds files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TriptychError(f"'{folder}' exists and is not an empty folder; choose another.")


def _family(model: nn.Module) -> Official:
    family = fitting(model)
    if family is None:
        raise TriptychError(
            f"no official format holds this {type(model).__name__} of its parts "
            f"({', '.join(OFFICIAL)} do not fit); keep the run's bundle."
        )
    return family


def _load(family: Official, config: PreTrainedConfig, source: Source) -> Model:
    from accelerate import init_empty_weights

    if torch.get_default_device().type == "meta":  # a dry run reads no weights
        model = family.build(config, source)
        model.official = config
        return model
    library, info = family.library().from_pretrained(
        resolve(source.path),
        revision=source.revision or "main",
        dtype=getattr(torch, source.dtype),
        # a family that reads the tensors itself never runs the library's class
        attn_implementation="eager" if family.read else source.attention,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    what = f"the checkpoint '{source.path}'"
    verbs = {"missing": "lacks", "unexpected": "also holds", "mismatched": "has other shapes of"}
    for kind, verb in verbs.items():
        names = sorted(map(str, info[f"{kind}_keys"]))
        if names:
            raise TriptychError(
                f"{what} {verb} {listed(names)}; name a complete checkpoint of "
                f"{family.model_class}."
            )
    theirs = library.state_dict()
    if family.read is not None:
        model = family.read(config, theirs, source).to(library.dtype)
    else:
        with init_empty_weights(include_buffers=False):  # the weights are taken over, not copied
            model = family.build(config, source)
        names = renamed(theirs, family.prefixes, what)
        load_exactly(model, {names[n]: t for n, t in theirs.items()}, what)
        tie(model)
    if hasattr(model, "language"):
        model.language.model.generation_config = library.generation_config
    model.official = config
    return model.eval()


def _save(family: Official, model: Model, folder: Path) -> None:
    from accelerate import init_empty_weights

    config = family.describe(model)
    if family.write is not None:
        tensors = family.write(model, config)
    else:
        back = {ours: theirs for theirs, ours in family.prefixes.items()}
        own = model.state_dict()
        names = renamed(own, back, "the model")
        tensors = family.finish({names[n]: t for n, t in own.items()}, config)
    with init_empty_weights(include_buffers=False):
        library = family.library()(config)
    load_exactly(library, tensors, "the model")
    tie(library)
    if hasattr(model, "language"):
        library.generation_config = model.language.model.generation_config
    library.save_pretrained(folder)
    family.extras(model, config, str(folder))


def _kind(config: PreTrainedConfig) -> str | None:
    """Whether a checkpoint is one part alone: "language" or "vision"."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "language"
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        found = found[0] if isinstance(found, (list, tuple)) else found
        return "vision" if found.main_input_name == "pixel_values" else None
    return None

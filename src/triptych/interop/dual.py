"""CLIP, SigLIP and ALIGN as their official checkpoints name things: one table each.

A row is (our prefix, their prefix). `load_official` and `export` use the same rows in the two
directions, and a key that no row explains is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from triptych.data.transforms import ImageTransform
from triptych.interop.official import Official, Source, save_sides
from triptych.parts.pretrained import resolve
from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from triptych.models.dual import DualEncoder

TOWERS = (("vision.model.", "vision_model."), ("text.model.", "text_model."))
CHECK = r"\.position_ids$"  # buffers that older files hold and no class reads


@dataclass(frozen=True)
class Table:
    """How one family's checkpoint is laid out.

    scale: their value of the similarity's scale from our logit_scale, and back.
    """

    config: str  # the library's configuration class
    rows: tuple[tuple[str, str], ...]
    scale_key: str = "logit_scale"
    scale: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = (
        Tensor.clone,
        Tensor.clone,
    )

    def theirs(self, name: str) -> str | None:
        return _renamed(name, self.rows)

    def ours(self, name: str) -> str | None:
        return _renamed(name, tuple((b, a) for a, b in self.rows))


TABLES = {
    "clip": Table(
        "CLIPConfig",
        (
            *TOWERS,
            ("heads.image.", "visual_projection."),
            ("heads.text.", "text_projection."),
            ("heads.logit_scale", "logit_scale"),
        ),
    ),
    "siglip": Table(
        "SiglipConfig",
        (*TOWERS, ("heads.logit_scale", "logit_scale"), ("heads.logit_bias", "logit_bias")),
    ),
    "align": Table(
        "AlignConfig",
        (*TOWERS, ("heads.text.", "text_projection."), ("heads.logit_scale", "temperature")),
        scale_key="temperature",  # divides the cosine; ours is the logarithm of a factor
        scale=(lambda ours: (-ours).exp(), lambda theirs: -theirs.log()),
    ),
}


def load_official(model: DualEncoder, source: str, revision: str | None = None) -> None:
    """Fill a DualEncoder from a CLIP, SigLIP or ALIGN checkpoint, all of it or an error."""
    fill(model, read_tensors(source, revision), source)


def fill(model: DualEncoder, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Put official tensors into a DualEncoder; one that either side lacks is an error."""
    table = TABLES[family(model)]
    found: dict[str, Tensor] = {}
    left = []
    for name, tensor in tensors:
        ours = table.ours(name)
        if ours is not None:
            found[ours] = table.scale[1](tensor) if name == table.scale_key else tensor
        elif not re.search(CHECK, name):
            left.append(name)
    own = {n: t for n, t in model.state_dict().items() if not re.search(CHECK, n)}
    found = {n: t for n, t in found.items() if not re.search(CHECK, n)}
    missing, left = sorted(own.keys() - found.keys()), left + sorted(found.keys() - own.keys())
    if missing or left:
        what = f"lacks {missing[0]}" if missing else f"holds {left[0]}, which the model has not"
        raise TriptychError(
            f"the checkpoint '{source}' {what} ({len(missing)} missing, {len(left)} left over); it "
            "belongs to another model: check the sizes in the preset."
        )
    odd = next((n for n, t in found.items() if t.numel() != own[n].numel()), None)
    if odd is not None:
        raise TriptychError(
            f"'{odd}' has shape {tuple(own[odd].shape)} here and {tuple(found[odd].shape)} in "
            f"'{source}'; check the sizes in the preset."
        )
    # scalars are stored as (1,) by SigLIP and as () here
    model.load_state_dict({n: t.reshape(own[n].shape) for n, t in found.items()}, strict=False)


def official_state(model: DualEncoder) -> dict[str, Tensor]:
    """The model's tensors under the keys, and in the shapes, of the official class."""
    name = family(model)
    table = TABLES[name]
    state, left = {}, []
    for ours, tensor in model.state_dict().items():
        theirs = table.theirs(ours)
        if theirs is None:
            left.append(ours)
            continue
        state[theirs] = table.scale[0](tensor) if theirs == table.scale_key else tensor
    if left:
        raise TriptychError(
            f"'{left[0]}' has no place in a {name} checkpoint ({len(left)} such tensors); only a "
            "model with that family's own heads, and adapters merged, can be exported."
        )
    if name == "siglip":
        state |= {k: state[k].reshape(1) for k in ("logit_scale", "logit_bias")}
    return state


def export(model: DualEncoder, folder: str | Path) -> Path:
    """Write config.json and model.safetensors that the library's own class loads."""
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in official_state(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    describe(model).save_pretrained(folder)
    return folder


def describe(model: DualEncoder) -> PreTrainedConfig:
    """The official configuration of a model's towers."""
    import transformers

    if model.official is not None:
        return deepcopy(model.official)
    config = getattr(transformers, TABLES[family(model)].config)(
        text_config=model.text.config.to_dict(), vision_config=model.vision.config.to_dict()
    )
    if hasattr(config, "projection_dim"):
        config.projection_dim = model.heads.dim
    return config


def build(config: PreTrainedConfig, source: Source) -> DualEncoder:
    """The architecture of an official configuration from our parts, with random weights."""
    from triptych.models.dual import DualEncoder, Heads
    from triptych.parts.text import TextEncoder
    from triptych.parts.vision import VisionEncoder

    kind = config.model_type
    built = {"attention": source.attention, "dtype": source.dtype}
    vision = VisionEncoder(
        config=config.vision_config.to_dict(),
        model_class=f"transformers.{CLASSES[kind]}VisionModel",
        transform=ImageTransform.of(source.path, config.vision_config),
        **built,
    )
    text = TextEncoder(
        config=config.text_config.to_dict(),
        tokenizer=source.path,
        revision=source.revision,
        pooling="first" if kind == "align" else "model",
        padding="max_length" if kind == "siglip" else "longest",
        model_class=f"transformers.{CLASSES[kind]}TextModel",
        **built,
    )
    own: dict[str, Any] = {
        "clip": {"dim": getattr(config, "projection_dim", None)},
        "siglip": {
            "image_projection": "identity",
            "text_projection": "identity",
            "scale": 10.0,
            "bias": -10.0,
            "max_scale": None,
        },
        "align": {
            "dim": getattr(config, "projection_dim", None),
            "image_projection": "identity",
            "projection_bias": True,
            "scale": 1.0,
            "max_scale": None,
        },
    }
    return DualEncoder(vision, text, partial(Heads, **own[kind]))


def read(config: PreTrainedConfig, state: dict[str, Tensor], source: Source) -> DualEncoder:
    """An official checkpoint's tensors in our parts."""
    model = build(config, source)
    fill(model, state.items(), source.path)
    return model


def write(model: DualEncoder, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The official tensors of a model, whatever it was read from."""
    return official_state(model)


def _fits(kind: str, model: Any) -> bool:
    """Whether both towers are of this family and each tensor has a place in its checkpoint."""
    from triptych.models.dual import DualEncoder

    if not isinstance(model, DualEncoder):
        return False
    kinds = {p.config.model_type.partition("_")[0] for p in (model.vision, model.text)}
    table = TABLES[kind]
    return kinds == {kind} and all(table.theirs(name) is not None for name in model.state_dict())


def family(model: DualEncoder) -> str:
    """The checkpoint layout of a model's towers: clip, siglip or align."""
    kind = model.vision.config.model_type.partition("_")[0]
    if kind not in TABLES:
        raise TriptychError(
            f"a DualEncoder over '{model.vision.config.model_type}' has no official layout; it is "
            f"known for {', '.join(TABLES)}."
        )
    return kind


def read_tensors(source: str, revision: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's or hub id's safetensors files, one at a time."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(
            resolve(source), name, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    try:
        single, index = find("model.safetensors"), find("model.safetensors.index.json")
    except OSError:
        single = index = None
    if single is None and index is None:
        raise TriptychError(
            f"'{source}' has no model.safetensors within reach; check the folder, the hub id or "
            "the connection."
        )
    names = [single] if single else _shards(Path(index), find)
    for path in names:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield name, file.get_tensor(name)


def _shards(index: Path, find: Callable[[str], str | None]) -> list[str]:
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    odd = [name for name in files if Path(name).name != name]
    if odd:
        raise TriptychError(f"'{index}' names the file '{odd[0]}' outside its folder; not read.")
    return [str(find(name)) for name in files]


def _renamed(name: str, rows: tuple[tuple[str, str], ...]) -> str | None:
    for a, b in rows:
        if name == a or (a.endswith(".") and name.startswith(a)):
            return b + name[len(a) :]
    return None


CLASSES = {"clip": "CLIP", "siglip": "Siglip", "align": "Align"}
OFFICIAL = {
    kind: Official(
        f"{name}Model",
        {},
        build,
        describe,
        partial(_fits, kind),
        extras=save_sides,
        read=read,
        write=write,
    )
    for kind, name in CLASSES.items()
}

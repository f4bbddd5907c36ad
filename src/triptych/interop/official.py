"""What one family's table of an official checkpoint states, and how its names become ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from triptych.types import TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from triptych.models.base import Model


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is read from, and how its parts are built."""

    path: str  # folder or hub id
    revision: str | None = None
    template: str | None = None
    attention: str = "sdpa"
    dtype: str = "float32"


def _unchanged(tensors: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    return tensors


def _nothing(model: Model, config: PreTrainedConfig, folder: str) -> None:
    return None


@dataclass(frozen=True)
class Official:
    """One official family: the library's class, its names and ours, and the two builders.

    prefixes: theirs -> ours; the longest that a name starts with decides. A name no prefix covers,
    and one that only one side has, is an error.
    build: the parts for a configuration, without weights. describe: the configuration of a model
    of ours, or an error that says what the official class cannot hold.
    fits: whether the family could hold the model at all. finish: changes to the tensors that the
    official class needs. extras: writes what stands beside the weights (tokenizer, processor).
    read, write: from and to the official tensors, for families whose parts share tensors or hold
    more than the official class; the prefix table is then theirs alone.
    """

    model_class: str  # a class of transformers
    prefixes: Mapping[str, str]
    build: Callable[[Any, Source], Model]
    describe: Callable[[Model], PreTrainedConfig]
    fits: Callable[[Model], bool]
    finish: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = _unchanged
    extras: Callable[[Model, Any, str], None] = _nothing
    read: Callable[[Any, dict[str, Tensor], Source], Model] | None = None
    write: Callable[[Any, Any], dict[str, Tensor]] | None = None

    def library(self) -> type:
        """The class of transformers that reads and writes this checkpoint."""
        import transformers

        return getattr(transformers, self.model_class)


def kept_config(model: Model) -> PreTrainedConfig:
    """The configuration a model came with; only what `from_hf` read can go back by it."""
    if model.official is None:
        raise TriptychError(
            "this model was not read from an official checkpoint, so there is no configuration to "
            "write; start from one with from_hf, or keep the run's bundle."
        )
    return deepcopy(model.official)


def came_from(model_class: str) -> Callable[[Model], bool]:
    """A check that a model was read from a checkpoint of this class."""

    def check(model: Model) -> bool:
        config = getattr(model, "official", None)
        return config is not None and (config.architectures or [None])[0] == model_class

    return check


def save_sides(model: Model, config: PreTrainedConfig, folder: str) -> None:
    """Write the image processor and, if there is one, the tokenizer."""
    model.vision.transform.to_library().save_pretrained(folder)
    owners = (getattr(model, role, None) for role in ("language", "text", "connector"))
    part = next((p for p in owners if hasattr(type(p), "tokenizer")), None)
    try:
        tokenizer = part and part.tokenizer
    except (OSError, ValueError, TriptychError):
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def renamed(names: Collection[str], prefixes: Mapping[str, str], what: str) -> dict[str, str]:
    """name -> new name by the longest prefix. Raises TriptychError that lists uncovered names."""
    found, left = {}, []
    for name in names:
        fitting = [p for p in prefixes if name.startswith(p)]
        if fitting:
            longest = max(fitting, key=len)
            found[name] = prefixes[longest] + name[len(longest) :]
        else:
            left.append(name)
    if left:
        raise TriptychError(
            f"{what} holds {listed(left)}, for which the prefix table has no place; it belongs to "
            "another architecture, or the table needs a row."
        )
    return found


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Assign tensors to a module whose state has exactly these names and shapes."""
    own = module.state_dict(keep_vars=True)
    missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    odd = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if missing or left or odd:
        found = {"lacks": missing, "also holds": left, "has other shapes of": odd}
        problems = [f"{verb} {listed(names)}" for verb, names in found.items() if names]
        raise TriptychError(
            f"{what} {' and '.join(problems)}; name a checkpoint of this architecture."
        )
    module.load_state_dict(dict(tensors), assign=True)


def tie(module: nn.Module) -> None:
    """Make tensors that a library model shares one tensor again; assigning took them apart."""
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def listed(names: Collection[str], most: int = 8) -> str:
    """Names for a message; many are cut short with their number."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

"""`_target_` is the registry: find what it names, and know which parameters it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from triptych.errors import ConfigError

SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys


def check_targets(cfg: DictConfig, extra: tuple[str, ...] = ()) -> None:
    """Raise ConfigError on an unresolvable interpolation, or a `_target_` that cannot be called.

    Imports every target of the configuration and compares the keys beside it with its signature.
    `extra` names keys (dotted, from the root) that the project itself takes out of such nodes.
    """
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        message = " ".join(str(error).split("full_key")[0].split())
        raise ConfigError(f"{error.full_key}: {message}; check its spelling.") from error
    for path, node in _nodes(tree):
        if not isinstance(node.get("_target_"), str):
            continue
        names, takes_any = parameters(node["_target_"], path)
        free = (*names, *SPECIAL)
        wrong = [k for k in node if k not in free and f"{path}.{k}".lstrip(".") not in extra]
        if wrong and not takes_any:
            hint = did_you_mean(wrong[0], names) or f"it takes {', '.join(names) or 'nothing'}."
            raise ConfigError(f"'{path}.{wrong[0]}' is no parameter of {node['_target_']}; {hint}")


def parameters(target: str, path: str) -> tuple[list[str], bool]:
    """The parameters a `_target_` takes by name, and whether it takes any others too."""
    try:
        signature = inspect.signature(locate(target, path))
    except (TypeError, ValueError):  # some built-in callables have no signature
        return [], True
    kinds = signature.parameters.values()
    names = [p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names, any(p.kind is p.VAR_KEYWORD for p in kinds)


def locate(target: str, path: str = "") -> Callable:
    """Import what a `_target_` names. Raises ConfigError that names the configuration's `path`."""
    where = f"{path}._target_={target}" if path else f"_target_={target}"
    parts = target.split(".")
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and f"{module}.".startswith(f"{error.name}."):
                continue  # a shorter prefix may be the module, the rest a class
            raise ConfigError(
                f"{where} needs the package '{error.name}', which is not installed; install it "
                "with pip or choose another option."
            ) from error
        return _attribute(found, parts[size:], module, where)
    raise ConfigError(
        f"{where}: there is no module '{parts[0]}'; check the import path, and that the module's "
        "folder is installed or on PYTHONPATH."
    )


def did_you_mean(word: str, names: list[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """`did you mean 'NAME'?` for the closest name, or nothing if none is close."""
    match = get_close_matches(word, names, n=1, cutoff=cutoff)
    return f"did you mean '{prefix}{match[0]}'?" if match else ""


def _attribute(found: Any, names: list[str], module: str, where: str) -> Callable:
    for name in names:
        if not hasattr(found, name):
            hint = did_you_mean(name, dir(found)) or "check the import path."
            raise ConfigError(f"{where}: {module} has no '{name}'; {hint}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"{where} names a {type(found).__name__}; give a class or a function.")
    return found


def _nodes(tree: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    if isinstance(tree, dict):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _nodes(value, f"{path}.{key}" if path else str(key))

"""Says no to a wrong command line before anything is built, in one sentence that names the fix.

Hydra accepts any key behind a `+` and starts jobs whose required values are missing. Here every
key given on the command line has to exist in the composed tree, or be a parameter of the
`_target_` it is written under, or lie below a node of `OPEN`. With that rule the plus itself
carries no meaning any more: it is added where Hydra needs it and dropped where it would complain.
All functions expect Hydra to be initialised on the configuration tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from triptych.errors import ConfigError
from triptych.targets import SPECIAL, did_you_mean, parameters

# Nodes whose keys are the user's to name: below them nothing is checked here.
OPEN = (
    "peft.roles",
    "peft.options",
    "model.trains",
    "model.options",
    "judge.model.options",
    "optim.parts",
    "objective.weights",
    "data.train.sets",
    "data.train.shares",
    "trainer.options",
    "hydra.job.env_set",
    "hydra.sweeper",
    "hydra.callbacks",
)


def check_overrides(config_name: str, overrides: list[str]) -> tuple[list[str], DictConfig]:
    """Validate a command line; return it with its pluses put right, and the first job's config.

    `dry_run=true` means `dry_run.enabled=true`, as for every node that has that key. A sweep is
    checked once for each value of each swept group. The configuration holds `hydra`.
    A value that holds "=", as the folders of a sweep do, needs no quotes. Raises ConfigError.
    """
    overrides = [_readable(text) for text in overrides]
    parsed = [_parse(text) for text in overrides]
    groups = [o for o in parsed if _is_group(o)]
    values = [o for o in parsed if not _is_group(o)]
    choices = list(_choices(groups))
    new: set[str] = set()
    switched: dict[str, str] = {}  # as written -> as meant
    for choice in choices:
        tree = OmegaConf.to_container(_compose(config_name, choice), resolve=False)
        switched |= {v.input_line: _switched(v, tree) for v in values}
        values = [_parse(switched.get(v.input_line, v.input_line)) for v in values]
        new |= {v.input_line for v in values if _needs_plus(v, tree, values)}
    fixed = {v.input_line: _with_plus(v, v.input_line in new) for v in values}
    firsts = [_first(v, fixed[v.input_line]) for v in values]
    cfgs = [_compose(config_name, choice + firsts) for choice in choices]
    swept = next((o.input_line for o in parsed if o.is_sweep_override()), None)
    if swept and cfgs[0].hydra.mode is not RunMode.MULTIRUN:
        key, _, value = swept.partition("=")
        raise ConfigError(
            f"'{swept}' gives several values to one run; add -m to run one job for each, "
            f"or write {key}=[{value}] if it is a list."
        )
    meant = [switched.get(text, text) for text in overrides]
    return [fixed.get(text, text) for text in meant], cfgs[0]


def group_choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a file of a group, without those that set values."""
    return [text for text in overrides if _is_group(_parse(text))]


def check_missing(cfg: DictConfig) -> None:
    """Raise ConfigError if a required value (`???`) was not given."""
    tree = OmegaConf.to_container(cfg, resolve=False)
    tree.pop("hydra", None)
    missing = [key for key, value in leaves(tree) if value == MISSING]
    if missing:
        examples = " ".join(f"{key}=VALUE" for key in missing)
        raise ConfigError(f"{', '.join(missing)} must be given; add {examples}")


def quoted(value: object) -> str:
    """A value that Hydra's grammar reads back as it is: backslashes count before quotes alone."""
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value))
    return f"'{text}'"


def _readable(text: str) -> str:
    """key=a=b, which the grammar has no meaning for, as key='a=b'."""
    key, _, value = text.partition("=")
    plain = "=" in value and not set(value) & set(",'\"[]{}()$\\")
    return f"{key}={quoted(value)}" if plain else text


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create(_loader()).parse_overrides([text])[0]
    except OverrideParseException as error:
        if "=" not in text:
            raise ConfigError(
                f"'{text}' is not an option; options are written key=value, such as seed=1."
            ) from error
        key, _, value = text.partition("=")
        raise ConfigError(
            f"'{text}' cannot be read; a value with brackets, commas or other special characters "
            f"needs quotes of its own inside the shell's, as in '{key}=\"{value}\"'."
        ) from error


def _is_group(override: Override) -> bool:
    return not isinstance(override.value(), dict) and _group_exists(override.key_or_group)


def _first(override: Override, text: str) -> str:
    """The override with the first value of its sweep; `text` is how it is written."""
    if not override.is_sweep_override():
        return text
    key, value = text.partition("=")[0], override.value()
    if override.is_discrete_sweep():
        return f"{key}={next(iter(override.sweep_string_iterator()))}"
    return f"{key}={value.start}" if isinstance(value, IntervalSweep) else text


def _choices(groups: list[Override]) -> Iterator[list[str]]:
    """The group overrides of the jobs to check: the first, then one for each other swept value."""
    base = [_first(g, g.input_line) for g in groups]
    yield base
    for at, group in enumerate(groups):
        if group.is_discrete_sweep():
            for value in list(group.sweep_string_iterator())[1:]:
                yield [*base[:at], f"{group.get_key_element()}={value}", *base[at + 1 :]]


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, overrides, return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_no_such_option(error, overrides)) from error
    except HydraException as error:
        raise ConfigError(_refused(error)) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"the configuration cannot be read: {_line(error)}") from error


def _no_such_option(error: MissingConfigException, overrides: list[str]) -> str:
    missing = str(error.missing_cfg_file)
    for text in overrides:
        key, _, given = text.lstrip("+").partition("=")
        group = key.partition("@")[0]
        value = missing.removeprefix(f"{group}/")
        if _group_exists(group) and value != missing and value in given:
            options = _options(group)
            hint = did_you_mean(value, options, f"{group}=", cutoff=0.4) or "choose an option"
            return f"there is no {group}={value}; {hint} ({group}: {', '.join(options)})"
    where = _line(error).split(" Available options")[0].split(" Config search path")[0]
    return f"{where}; check the names in the defaults list."


def _refused(error: HydraException) -> str:
    message = _line(error)
    key = (re.findall(r"'([^']+)'", message) or [""])[0].partition("=")[0]
    if message.startswith("Could not override") and _group_exists(key):
        return f"this configuration makes no choice of '{key}'; --info defaults shows its choices."
    if message.startswith("Multiple values for"):
        key = message.split()[3].rstrip(".")
        return f"'{key}' is chosen twice; write {key}=OPTION once, without a plus."
    if message.startswith("You must specify"):
        return f"'{key}' must be chosen; add {key}=OPTION ({key}: {', '.join(_options(key))})"
    cause = f" {_line(error.__cause__).split(' full_key:')[0]}" if error.__cause__ else ""
    return f"{message}{cause}"


def _switched(override: Override, tree: dict) -> str:
    """The override's text; true or false given to a node with `enabled` sets that key."""
    key, text = override.key_or_group, override.input_line
    depth, node = _walk(key, tree)
    whole = depth == len(key.split(".")) and isinstance(node, dict) and "enabled" in node
    if override.is_delete() or not whole or isinstance(override.value(), dict):
        return text
    if not isinstance(override.value(), bool):
        raise ConfigError(f"{key} is true or false; what it holds is set by {key}.KEY=VALUE.")
    return f"{key}.enabled={text.partition('=')[2]}"


def _needs_plus(override: Override, tree: dict, values: list[Override]) -> bool:
    """Whether the key has to be added to the tree. Raises ConfigError if it is unknown there."""
    key = re.sub(r"\[(\w+)\]", r".\1", override.key_or_group)
    value = None if override.is_delete() else override.value()
    keys = [f"{key}.{leaf}" for leaf in _keys(value)] if isinstance(value, dict) else [key]
    return any([_is_new(k, override, tree, values) for k in keys])


def _is_new(key: str, override: Override, tree: dict, values: list[Override]) -> bool:
    parts, (depth, node) = key.split("."), _walk(key, tree)
    if depth == len(parts) or any(f"{key}.".startswith(f"{name}.") for name in OPEN):
        return depth < len(parts)
    path, name = ".".join(parts[:depth]), parts[depth]
    here = f"{path}." if path else ""
    given = [v.value() for v in values if v.key_or_group == f"{here}_target_"]
    target = given[-1] if given else node.get("_target_") if isinstance(node, dict) else None
    if isinstance(target, str) and not override.is_delete():
        names, takes_any = parameters(target, path)
        if name in (*names, *SPECIAL) or (takes_any and not did_you_mean(name, names, cutoff=0.8)):
            return True
        hint = did_you_mean(name, names, here) or f"it takes {', '.join(names)}."
        raise ConfigError(f"unknown option '{key}', and {target} has no such parameter; {hint}")
    if node is not None and not isinstance(node, dict | list):
        raise ConfigError(f"unknown option '{key}': '{path}' is a value, it has no keys below it.")
    raise ConfigError(f"unknown option '{key}'; {_nearest(key, here, node, tree)}")


def _nearest(key: str, here: str, node: Any, tree: dict) -> str:
    """What was meant: a key beside it, a group, the same name elsewhere, or any close key."""
    name, dot, rest = key[len(here) :].partition(".")
    beside = [str(k) for k in node] if isinstance(node, dict) else []
    if match := get_close_matches(name, beside, n=1, cutoff=0.6):
        return f"did you mean '{here}{match[0]}{dot}{rest}'?"
    if "." not in key and (hint := did_you_mean(key, _groups())):
        return hint
    known = {}  # by last part, the shortest
    for path in sorted(_keys(tree), key=len, reverse=True):
        if path.startswith("hydra.") == key.startswith("hydra."):
            known[path.rpartition(".")[2]] = path
    if match := get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.8):
        return f"did you mean '{known[match[0]]}'?"
    beside = [k for k in beside if k != "hydra"]
    return f"{here.rstrip('.') or 'the configuration'} has {', '.join(beside) or 'no keys'}."


def _with_plus(override: Override, new: bool) -> str:
    text = override.input_line
    return text if text.startswith("~") else ("++" if new else "") + text.lstrip("+")


def _walk(key: str, tree: Any) -> tuple[int, Any]:
    """How many parts of a dotted key exist, and the node they lead to."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return depth, tree
    return len(parts), tree


def leaves(tree: dict) -> Iterator[tuple[str, Any]]:
    """The dotted names of all leaves, with their values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{leaf}", v) for leaf, v in leaves(value))
        else:
            yield str(key), value


def _keys(tree: dict) -> list[str]:
    return [key for key, _ in leaves(tree)]


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _group_exists(name: str) -> bool:
    return any(s.available() and s.is_group(name) for s in _loader().get_sources())


def _groups(parent: str = "") -> list[str]:
    paths = [f"{parent}/{name}".lstrip("/") for name in _loader().list_groups(parent)]
    return [found for path in paths for found in (path, *_groups(path))]


def _options(group: str) -> list[str]:
    """The options of a group; a folder named like one holds its variants (`model=llava/7b`)."""
    options = list(_loader().get_group_options(group, ObjectType.CONFIG))
    folders = [f for f in _loader().get_group_options(group, ObjectType.GROUP) if f in options]
    return sorted(options + [f"{f}/{name}" for f in folders for name in _options(f"{group}/{f}")])


def _line(error: object) -> str:
    return " ".join(str(error).split())

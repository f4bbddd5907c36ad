"""What a run changed of the recipe it chose: its experiment, its model and the other groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from triptych.cli import conf_dir
from triptych.config_check import group_choices, leaves

Changes = dict[str, dict[str, Any]]


def changes(cfg: DictConfig, overrides: Sequence[str]) -> Changes:
    """Key -> {"recipe", "run"} wherever a command line departs from the groups that it names.

    `recipe` is null for a key that only the run has, `run` for one that it left out.
    """
    if not overrides:
        return {}
    with _hydra():
        stated = hydra.compose("train", group_choices(overrides))
    before, after = (
        {key: value for key, value in leaves(OmegaConf.to_container(tree, resolve=False))}
        for tree in (stated, cfg)
    )
    return {
        key: {"recipe": before.get(key), "run": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key != "ckpt"  # continuing a run changes no recipe
    }


def text(changed: Changes, overrides: Sequence[str]) -> str:
    """The changes in a line, behind the recipe's name."""
    named = [o for o in overrides if o.startswith(("experiment=", "model="))]
    listed = ", ".join(f"{key} {c['recipe']} -> {c['run']}" for key, c in changed.items())
    return f"Changed from the recipe ({' '.join(named) or 'the default'}): {listed or 'nothing'}."


def _hydra() -> AbstractContextManager:
    """The configuration tree of the command, or of this installation if there is none."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(conf_dir()), version_base="1.3")

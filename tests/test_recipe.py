"""What a run changed of the recipe it names."""

from __future__ import annotations

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from triptych.cli import conf_dir
from triptych.recipe import changes, text


def changed(*overrides: str):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra.compose("train", list(overrides))
        inside = changes(cfg, overrides)
    assert changes(cfg, overrides) == inside  # also where no command is running
    return inside


def test_values_are_listed_beside_the_papers_and_choices_are_not():
    found = changed(
        "experiment=blip/pretrain",
        "peft=lora",
        "data.path=mine.json",
        "data.batch_size=64",
        "optim.lr=3e-4",  # what the recipe says already
        "++trainer.max_steps=10",
        "~optim.parts",
    )
    assert found == {
        "data.batch_size": {"recipe": 2880, "run": 64},
        "data.path": {"recipe": "???", "run": "mine.json"},
        "optim.parts": {"recipe": {}, "run": None},
        "trainer.max_steps": {"recipe": -1, "run": 10},
    }
    line = text(found, ["experiment=blip/pretrain", "data.batch_size=64"])
    assert line.startswith(
        "Changed from the recipe (experiment=blip/pretrain): data.batch_size 2880"
    )


@pytest.mark.parametrize("overrides", [(), ("experiment=llava/align",), ("model=clip/b32",)])
def test_a_recipe_as_it_stands_changes_nothing(overrides):
    found = changed(*overrides)
    assert found == {}
    assert text(found, overrides).endswith("nothing.")

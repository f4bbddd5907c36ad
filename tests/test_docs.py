"""The pages' own code: each family in use, and an eleventh family from one YAML and one file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from triptych.build import build_model, build_objective
from triptych.cli import conf_dir

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_each_family_in_use(capsys):
    torch.manual_seed(0)
    found = blocks("families.md", "python")
    known: dict = {}
    for code in found:
        exec(compile(code, "families.md", "exec"), known)
    assert len(found) == 7
    assert known["model"].answer(known["picture"], "what is it?") is not None


@pytest.fixture
def eleventh(tmp_path, monkeypatch):
    """A copy of the configuration with one more YAML, and one file on the Python path."""
    (part,), (family,) = blocks("add-a-family.md", "python"), blocks("add-a-family.md", "yaml")
    (tmp_path / "my_lab.py").write_text(part)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "model" / "paligemma.yaml").write_text(family)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        return hydra.compose("train", ["model=paligemma"])


def test_an_eleventh_family_is_one_yaml_and_one_file(eleventh, tiny, dialogue):
    eleventh.model.vision.weights = str(tiny / "vision")
    eleventh.model.language.weights = str(tiny / "language")
    torch.manual_seed(0)
    model = build_model(eleventh).model
    processor, objective = model.processor(), build_objective(eleventh, 1)
    samples = [dialogue(("what color?", "red"), name="a"), dialogue(("circle?", "no"), name="b")]
    model.eval()
    with torch.no_grad():
        packed = objective(model, processor.rows([samples]))["next_token"].sum
        alone = sum(objective(model, processor.rows([[s]]))["next_token"].sum for s in samples)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)

    # an early word of the question sees a later one, which no causal decoder lets it
    batch = processor.prompts(samples[:1])
    with torch.no_grad():
        before = model(batch)
        batch.text["language"].ids[0, -2] += 1
        changed = (model(batch) - before).abs().amax(-1)[0] > 1e-6
    first = int((batch.text["language"].segments[0] == 1).nonzero()[0])
    assert changed[first:].all() and not changed[:first].any()

    model.train()
    batch = processor.rows([samples])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        loss = objective(model, batch)["next_token"].sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    said = model.eval().generate(processor.prompts(samples), max_new_tokens=1)
    expected = [
        processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("red", "no")
    ]
    assert said[:, 0].tolist() == expected

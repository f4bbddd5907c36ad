"""The bundle: all that a run leaves, and refused on another base.

RUN/bundle/ holds the trained tensors (adapters, projector, heads: whatever the parts table
trained), the tokenizer with its template, the image transform, the fingerprints of the untouched
bases and the resolved configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from triptych.build import Adapted, build_model
from triptych.lit import saved_names
from triptych.models.base import Model
from triptych.types import TriptychError

FORMAT = 1


def save_bundle(
    folder: Path, adapted: Adapted, processor: Any, cfg: DictConfig, note: dict[str, Any]
) -> Path:
    """Write the bundle to the side and move it into place."""
    import shutil

    from safetensors.torch import save_file

    side = folder.with_name(folder.name + ".writing")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    tensors, aliases = unique_tensors(trained_tensors(adapted.model))
    save_file(tensors, side / "weights.safetensors")
    (side / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    if hasattr(processor, "tokenizer"):
        processor.tokenizer.save_pretrained(side / "tokenizer")
    if hasattr(processor, "save_pretrained"):  # a library's own, with its image side
        processor.save_pretrained(side / "processor")
    loader = getattr(processor, "images", None)
    (side / "bundle.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "bases": adapted.bases,
                "aliases": aliases,
                "table": [asdict(row) for row in adapted.table.rows],
                "transform": vars(loader.transform) if loader else None,
                **note,
            },
            indent=1,
            default=str,
        )
    )
    shutil.rmtree(folder, ignore_errors=True)
    side.rename(folder)
    return folder


def load_bundle(folder: Path) -> tuple[DictConfig, Adapted]:
    """Rebuild a run's model: its bases from their own source, then what training changed."""
    cfg = OmegaConf.load(folder / "config.yaml")
    adapted = build_model(cfg)
    load_trained(folder, adapted)
    return cfg, adapted


def load_trained(folder: Path, adapted: Adapted) -> None:
    """Put a bundle's tensors into a built model; another base or table is refused."""
    from safetensors.torch import load_file

    facts = json.loads((folder / "bundle.json").read_text())
    if facts.get("format") != FORMAT:
        raise TriptychError(
            f"the bundle {folder} has format {facts.get('format')}, this version reads {FORMAT}; "
            "load it with the version that wrote it."
        )
    for role, known in facts["bases"].items():
        here = adapted.bases.get(role)
        if here != known and _built_on(facts, role):
            raise TriptychError(
                f"the bundle {folder} was trained on another base: the weights of '{role}' have "
                f"fingerprint {here}, and {known} at training; restore those weights."
            )
    tensors = load_file(folder / "weights.safetensors")
    tensors |= {alias: tensors[name] for alias, name in facts["aliases"].items()}
    wanted = saved_names(adapted.model)
    if wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())
        raise TriptychError(
            f"the bundle {folder} and the model differ in {len(odd)} tensors (first: {odd[0]}); it "
            "was trained with another parts table."
        )
    adapted.model.load_state_dict(tensors, strict=False)


def find_bundle(run: str | Path) -> Path | None:
    """The bundle folder of a run, or None if this is no run."""
    for folder in (Path(run), Path(run) / "bundle"):
        if (folder / "bundle.json").is_file():
            return folder
    return None


def model_options(model: str) -> list[str]:
    """The options that choose a preset, or "PRESET:ID": hf:FOLDER, gpt4v:gpt-4o-2024-08-06."""
    from triptych.config_check import quoted

    preset, separator, name = model.partition(":")
    return [f"model={preset}", *([f"model.id={quoted(name)}"] if separator else [])]


def compose_preset(model: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The training configuration of a preset, or of one with an id, composed anywhere."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from triptych.cli import conf_dir
    from triptych.config_check import check_missing, check_overrides

    options = [*model_options(model), *overrides]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), job_name="train", version_base="1.3"):
        checked, _ = check_overrides("train", options)
        cfg = hydra.compose("train", checked)
    check_missing(cfg)
    return cfg


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What training changes, by name: trainable tensors and buffers of parts that train."""
    kept = saved_names(model)
    return {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if n in kept}


def unique_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, and alias -> name for tied tensors."""
    first: dict[tuple, str] = {}
    kept, aliases = {}, {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key in first and tensor.numel():
            aliases[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor.contiguous().cpu()
    return kept, aliases


def init_from(run: str | Path, adapted: Adapted) -> list[str]:
    """Start from another run's trained weights where names agree; returns what was taken."""
    from safetensors.torch import load_file

    folder = find_bundle(run)
    if folder is None:
        raise TriptychError(f"init_from={run} is no run: it holds no bundle/bundle.json.")
    tensors = load_file(folder / "weights.safetensors")
    facts = json.loads((folder / "bundle.json").read_text())
    tensors |= {alias: tensors[name] for alias, name in facts["aliases"].items()}
    own = adapted.model.state_dict(keep_vars=True)
    taken = sorted(n for n, t in tensors.items() if n in own and own[n].shape == t.shape)
    if not taken:
        raise TriptychError(
            f"init_from={run} shares no tensor with this model; its first is {next(iter(tensors))}."
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(tensors[name])
    return taken


def _built_on(facts: dict, role: str) -> bool:
    """Whether the bundle lacks tensors of this role, so that its base matters."""
    carried = ("full", "ema")
    rows = (r for r in facts["table"] if r["path"].split(".")[0] == role)
    return any(r["state"] not in carried for r in rows)

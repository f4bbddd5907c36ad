"""A run as one plain model: adapters merged, and proven to compute what the run computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

from triptych.adapt import Quantization, adapt
from triptych.build import Adapted, build_model
from triptych.bundle import find_bundle, load_bundle, load_trained, save_bundle
from triptych.interop.hub import fitting, from_hf, refuse_used, to_hf
from triptych.interop.merge import full_precision, merge_adapters
from triptych.table import merge
from triptych.types import Batch, ImageRef, Sample, TriptychError, assistant, user

Outputs = dict[str, Tensor]
PROMPTS = (("What is in the picture?", "A red square."), ("Is it large?", "yes"))


def export(
    run: str | Path,
    to: str | Path,
    base: Literal["dequantized", "original"] = "dequantized",
    tolerance: float = 1e-4,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Merge a run's adapters into its base and write it to `to`; returns what export.json holds.

    The outputs on fixed inputs, in float32, have to agree within `tolerance`: run with adapters =
    merged, and merged = read back from `to`; otherwise nothing is written. base: "dequantized" is
    the base the adapters were trained on; "original" its weights before quantization, and what
    that changes is reported apart, as is the rounding to `dtype`.
    The format is the official one where a family's table fits, else a bundle without adapters.
    """
    if base not in ("dequantized", "original"):
        raise TriptychError(f"base is '{base}'; it takes dequantized or original.")
    folder, bundle = Path(to), find_bundle(run)
    if bundle is None:
        raise TriptychError(f"run={run} is no run: it holds no bundle/bundle.json.")
    refuse_used(folder)
    cfg, adapted = load_bundle(bundle)
    batch = probe(adapted.model.processor(), seed)
    facts: dict[str, Any] = {"run": str(run), "base": base, "dtype": dtype, "seed": seed}
    expected = outputs(adapted.model, batch)
    if base == "original":
        trained = expected
        cfg, adapted = _on_original(cfg, bundle)
        expected = outputs(adapted.model, batch)
        facts["quantization_gap"] = largest(trained, expected)
    model = merge_adapters(adapted.model)
    merged = outputs(model, batch)
    facts["largest_output"] = max(float(t.abs().max()) for t in merged.values())
    facts["tolerance"] = tolerance
    facts["differences"] = {"merged - adapter": largest(merged, expected)}
    _refuse_above(facts, tolerance)
    side = folder.with_name(folder.name + ".exporting")
    shutil.rmtree(side, ignore_errors=True)
    try:
        facts["format"], again = _write(cfg, adapted, side, dtype)
        _round_like(model, again)
        rounded = outputs(model, batch)
        facts["rounding_gap"] = largest(rounded, merged)
        facts["differences"]["reloaded - merged"] = largest(outputs(again, batch), rounded)
        _refuse_above(facts, tolerance)
        (side / "export.json").write_text(json.dumps(facts, indent=1))
        if folder.exists():
            folder.rmdir()
        side.rename(folder)
    finally:
        shutil.rmtree(side, ignore_errors=True)
    return facts


def probe(processor: Any, seed: int) -> Batch:
    """Fixed inputs of any model: two dialogues about two pictures of random pixels."""
    random = np.random.default_rng(seed)
    height, width = processor.images.transform.size
    samples = []
    for i, (question, answer) in enumerate(PROMPTS):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ref = ImageRef.from_picture(Image.fromarray(pixels), f"probe {i}")
        samples.append(Sample([user(question, 1), assistant(answer)], [ref], id=f"probe {i}"))
    return processor.collate(samples)


@torch.inference_mode()
def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """What a model computes in float32: logits of every token, or its embeddings."""
    model = full_precision(model).eval()
    out = model(batch)
    if hasattr(model, "language"):
        return {"logits": model.language.logits(out[batch.text["language"].mask])}  # (tokens,V)
    many = out if isinstance(out, (tuple, list)) else [out]
    return {str(i): tensor for i, tensor in enumerate(many)}


def largest(one: Outputs, other: Outputs) -> float:
    """The largest difference; where a vocabulary has grown, of the tokens that both have."""
    differences = []
    for name, a in one.items():
        width = min(a.shape[-1], other[name].shape[-1])
        differences.append((a[..., :width] - other[name][..., :width]).abs().max())
    return float(torch.stack(differences).max())


def _write(cfg: DictConfig, adapted: Adapted, folder: Path, dtype: str) -> tuple[str, nn.Module]:
    """Write the merged model; its format and the model as it is read back."""
    family = fitting(adapted.model)
    if family is not None:
        for parameter in adapted.model.parameters():  # buffers (rotary frequencies) stay exact
            parameter.data = parameter.data.to(getattr(torch, dtype))
        to_hf(adapted.model, folder)
        return family.model_class, from_hf(folder, dtype=dtype)
    cfg = _without_adapters(cfg, adapted)
    model = adapted.model
    table = merge(model, cfg.model.trains, {}, {})
    adapt(model, table, None, Quantization())
    note = {"exported": True}
    save_bundle(folder, Adapted(model, table, adapted.bases), model.processor(), cfg, note)
    return "bundle", load_bundle(folder)[1].model


def _on_original(cfg: DictConfig, bundle: Path) -> tuple[DictConfig, Adapted]:
    """The run's trained tensors over its base as it was before quantization."""
    cfg = cfg.copy()
    cfg.quantization.method = "none"
    cfg.peft.name = "lora"  # as trained, but for the quantization that the name qlora promises
    adapted = build_model(cfg)
    load_trained(bundle, adapted)
    return cfg, adapted


def _without_adapters(cfg: DictConfig, adapted: Adapted) -> DictConfig:
    cfg = cfg.copy()
    cfg.quantization.method = "none"
    cfg.peft.name, cfg.peft.roles, cfg.peft.otherwise = "family", {}, {}
    cfg.model.trains = {role: "full" for role in adapted.model.roles}
    return cfg


def _round_like(model: nn.Module, other: nn.Module) -> None:
    """Round every tensor to the dtype in which the other model holds it."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(theirs[name].dtype)


def _refuse_above(facts: dict[str, Any], tolerance: float) -> None:
    for name, difference in facts["differences"].items():
        if not difference <= tolerance:  # NaN is refused too
            raise TriptychError(
                f"'{facts['run']}' was not exported: its outputs differ by {difference:.2g} "
                f"({name}), and tolerance={tolerance:g} (the largest output is "
                f"{facts['largest_output']:.3g}); raise tolerance if that is acceptable."
            )

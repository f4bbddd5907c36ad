"""One training run and one evaluation, the same for every family."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from triptych import forecast
from triptych.adapt import hardware_dtype, table_text
from triptych.audit import Audit
from triptych.build import (
    Adapted,
    build,
    build_data,
    build_model,
    build_objective,
    build_optim,
    parts_asked,
    without,
)
from triptych.bundle import find_bundle, init_from, load_bundle, save_bundle
from triptych.callbacks import FiniteGuard, GradNorms, Progress, Throughput
from triptych.checkpoint import Checkpoints, latest
from triptych.data.cache import FeatureCache, cache_dir
from triptych.data.datamodule import DataModule
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.records import format_table
from triptych.evaluation.runner import evaluate
from triptych.lit import LitVLM
from triptych.rundir import release_run_dir
from triptych.types import TriptychError


def train(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> float | None:
    """Build, fit, save and evaluate; returns the first metric, which sweepers need."""
    if cfg.dry_run.enabled:
        print(forecast.dry_run(cfg, overrides).text(cfg.dry_run.gpu_gb))
        release_run_dir(folder)
        return None
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    adapted = build_model(cfg, asked=parts_asked(overrides))
    if cfg.init_from is not None:
        taken = init_from(cfg.init_from, adapted)
        print(f"{len(taken)} tensors start from {cfg.init_from}.")
    optim = build_optim(cfg)
    print(table_text(adapted.model, adapted.table, optim.rates(adapted.model)), flush=True)
    processor = adapted.model.processor()
    objective = build_objective(cfg, cfg.trainer.accumulate_grad_batches)
    data = build_data(cfg, processor, objective)
    module = LitVLM(adapted.model, objective, optim)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    trainer = build_trainer(cfg, folder, optim.clip)
    start = latest(folder / "checkpoints") if cfg.ckpt == "last" else None
    adapted.model.to(trainer.strategy.root_device)
    if cfg.eval.at_start:
        before = score(cfg, adapted, processor, folder / "before", cfg.benchmark)
    use_cache(cfg, adapted, data)
    print(forecast.before_run(cfg, data, trainer.precision, overrides), flush=True)
    began = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    seconds = time.perf_counter() - began
    processor.images.cached = None
    note = {"steps": trainer.global_step, "train_seconds": round(seconds, 1)}
    if trainer.is_global_zero:
        save_bundle(folder / "bundle", adapted, processor, cfg, note)
    print(f"Trained {trainer.global_step} steps in {seconds:.0f} s.", flush=True)
    results = score(cfg, adapted, processor, folder, cfg.benchmark)
    if cfg.eval.at_start:
        print(format_table({"before": before, "after": results}))
    print(f"Run directory: {folder}", flush=True)
    return headline(results)


def evaluate_only(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> float | None:
    """Score a run with its own configuration, or a preset that was never trained here."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if (cfg.run is None) == (cfg.model is None):
        raise TriptychError("give run=DIR to score a run, or model=NAME to score a preset.")
    benchmarks = cfg.benchmark
    if cfg.run is not None:
        bundle = find_bundle(cfg.run)
        if bundle is None:
            raise TriptychError(f"run={cfg.run} is no run: it holds no bundle/bundle.json.")
        trained, adapted = load_bundle(bundle)
        benchmarks = benchmarks or trained.benchmark
    else:
        adapted = build_model(cfg, asked=parts_asked(overrides))
    results = score(cfg, adapted, adapted.model.processor(), folder, benchmarks)
    return headline(results)


def score(
    cfg: DictConfig, adapted: Adapted, processor: Any, out: Path, benchmarks: DictConfig | None
) -> dict[str, Any]:
    """Run the benchmarks on a model and print their table."""
    if not benchmarks:
        return {"metrics": {}}
    built = {str(name): build(node) for name, node in benchmarks.items()}
    predictor = ModelPredictor(adapted.model, processor, batch_size=cfg.eval.batch_size)
    results = evaluate(
        predictor, built, out, limit=cfg.eval.limit, blind=cfg.eval.blind, seed=cfg.seed
    )
    return results


def build_trainer(cfg: DictConfig, folder: Path, clip: float | None) -> pl.Trainer:
    """The Lightning trainer with the callbacks that watch over every run."""
    precision = cfg.trainer.precision
    if precision == "auto":
        cuda = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        fast = hardware_dtype("cuda" if cuda else "cpu")
        precision = "32-true" if fast == torch.float32 else {
            torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"
        }[fast]
    loggers = [build(node, folder=str(folder)) for node in cfg.logger.values()]
    callbacks = [
        Checkpoints(folder / "checkpoints"),
        Audit(),
        FiniteGuard(),
        GradNorms(),
        Throughput(),
        Progress(),
    ]
    return build(
        without(cfg.trainer, ["precision"]),
        precision=precision,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=loggers,
        gradient_clip_val=clip,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def use_cache(cfg: DictConfig, adapted: Adapted, data: DataModule) -> None:
    """Compute the features of a frozen vision encoder once, before training reads them."""
    vision = getattr(adapted.model, "vision", None)
    trained = vision is None or any(p.requires_grad for p in vision.parameters())
    if trained or not cfg.cache.features:
        return
    cache = FeatureCache(cache_dir() / "features", vision, adapted.bases["vision"])
    refs = (ref for i in range(len(data.reader)) for ref in data.reader[i].images)
    if cache.fill(refs, cfg.cache.limit_gb):
        data.processor.images.cached = cache
    else:
        print(f"Features would take more than cache.limit_gb={cfg.cache.limit_gb}; not cached.")


def headline(results: dict[str, Any]) -> float | None:
    """The first metric's value."""
    return next((entry["value"] for entry in results["metrics"].values()), None)

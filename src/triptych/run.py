"""One training run and one evaluation, the same for every family."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from triptych import forecast, recipe
from triptych.adapt import hardware_dtype, table_text
from triptych.audit import Audit
from triptych.build import (
    Adapted,
    build,
    build_data,
    build_model,
    build_objective,
    build_optim,
    compile_parts,
    parts_asked,
    without,
)
from triptych.bundle import init_from, save_bundle
from triptych.caching import use_cache
from triptych.callbacks import FiniteGuard, GradNorms, Progress, Throughput
from triptych.checkpoint import Checkpoints, latest
from triptych.data.datamodule import DataModule
from triptych.distributed import rank, share, start, wait
from triptych.evaluation.command import (
    build_benchmarks,
    identity_of,
    load_predictor,
    rescore_folder,
    score,
)
from triptych.evaluation.compare_runs import FILES
from triptych.evaluation.during import EvaluateSlice
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.records import format_table, merge_results, sample_rows
from triptych.hardware import keep_memory, quiet_libraries, return_memory
from triptych.lit import LitVLM
from triptych.rundir import record_outcome, release_run_dir
from triptych.tracking import system_info
from triptych.types import TriptychError


def train(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> float | None:
    """Build, fit, save and evaluate; returns the first metric, which sweepers need."""
    if cfg.dry_run.enabled:
        print(forecast.dry_run(cfg, overrides).text(cfg.dry_run.gpu_gb))
        release_run_dir(folder)
        return None
    keep_memory()
    quiet_libraries()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    adapted = build_model(cfg, asked=parts_asked(overrides))
    if cfg.init_from is not None:
        taken = init_from(cfg.init_from, adapted)
        print(f"{len(taken)} tensors start from {cfg.init_from}.")
    optim = build_optim(cfg)
    print(table_text(adapted.model, adapted.table, optim.rates(adapted.model)), flush=True)
    processor = adapted.model.processor()
    objective = build_objective(cfg, cfg.trainer.accumulate_grad_batches)
    if objective.saves_memory:
        return_memory()
    data = build_data(cfg, processor, objective)
    module = LitVLM(adapted.model, objective, optim)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    changed = recipe.changes(cfg, overrides)
    if changed:
        print(recipe.text(changed, overrides), flush=True)
    table = [vars(row) for row in adapted.table.rows]
    facts = {**system_info(cfg), "table": table, "changed": changed}
    (folder / "system.json").write_text(json.dumps(facts, indent=1, default=str))
    predictor = ModelPredictor(adapted.model, processor, batch_size=cfg.eval.batch_size)
    benchmarks, left_out = build_benchmarks(cfg.get("benchmark"))
    trainer = build_trainer(cfg, folder, optim.clip, EvaluateSlice(predictor, benchmarks, cfg.eval))
    exit_code = 1
    try:
        adapted.model.to(trainer.strategy.root_device)
        compile_parts(adapted.model, cfg.get("compile", []))
        tables, first = {}, None
        if cfg.eval.at_start and benchmarks:
            first = folder / "before"
            # the baselines stand beside the final numbers alone
            once = OmegaConf.merge(cfg, {"eval": {"blind": "none"}})
            identity = identity_of(cfg, adapted)
            tables["before"] = score(once, predictor, benchmarks, first, identity)
        fit(cfg, trainer, module, data, adapted, folder)
        bundle = folder / "bundle"
        if trainer.is_global_zero:
            note = {"steps": trainer.global_step}
            save_bundle(bundle, adapted, processor, cfg, note)
        wait()
        identity = identity_of(cfg, adapted, bundle)
        tables["after" if tables else "value"] = score(
            cfg, predictor, benchmarks, folder, identity, left_out=left_out, before=first
        )
        report(trainer, tables, folder, facts, benchmarks)
        exit_code = 0
    finally:
        for logger in trainer.loggers:
            if hasattr(logger, "finish"):
                logger.finish(exit_code)
    print(f"Run directory: {folder}", flush=True)
    value = headline(tables.popitem()[1])
    record_outcome(folder, "finished", value)
    return value


def fit(
    cfg: DictConfig,
    trainer: pl.Trainer,
    module: LitVLM,
    data: DataModule,
    adapted: Adapted,
    folder: Path,
) -> None:
    """Train from the start, or from the last checkpoint of this directory."""
    start = latest(folder / "checkpoints") if cfg.ckpt == "last" else None
    use_cache(cfg, adapted, data)
    print(forecast.before_run(cfg, data, trainer), flush=True)
    began = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    if hasattr(data.processor, "images"):
        data.processor.images.cached = None  # what is evaluated is encoded anew
    seconds = time.perf_counter() - began
    print(f"Trained {trainer.global_step:,} steps in {seconds:.0f} s.", flush=True)


def evaluate_only(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> float | None:
    """Score a run with its own configuration, a preset never trained here, or a remote model.

    `rescore=DIR` judges stored answers anew instead. Started by torchrun, processes share the work.
    """
    keep_memory()
    quiet_libraries()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.rescore is not None:
        if cfg.run is not None or cfg.model is not None:
            raise TriptychError("rescore=DIR takes all it needs from DIR; leave out run and model.")
        before, after = rescore_folder(Path(cfg.rescore), cfg.judge)
        print(format_table({"before": before, "rescored": after}))
        return headline(after)
    start()
    folder = Path(share(str(folder)))  # each process has drawn a name of its own
    predictor, identity, nodes = load_predictor(cfg, overrides)
    benchmarks, left_out = build_benchmarks(nodes)
    results = score(cfg, predictor, benchmarks, folder, identity, nodes, left_out)
    if rank() == 0:
        print(format_table({"value": results}))
        if cfg.run is not None and cfg.eval.images == "own" and cfg.eval.limit is None:
            merge_results(Path(cfg.run) / "results.json", results)
        print(f"Results: {folder}", flush=True)
    record_outcome(folder, "finished", headline(results))
    return headline(results)


def report(
    trainer: pl.Trainer, tables: dict[str, dict], folder: Path, facts: dict, benchmarks: dict
) -> None:
    """Print the table of results and send it, with the samples, to every sink."""
    final = list(tables.values())[-1]
    if not final["metrics"]:
        return
    print(format_table(tables))
    values = {key: entry["value"] for key, entry in final["metrics"].items()}
    for logger in trainer.loggers:
        logger.log_metrics({f"eval/{k}": v for k, v in values.items()}, trainer.global_step)
        if hasattr(logger, "log_summary"):
            logger.log_summary({**values, "system": facts})
        if hasattr(logger, "log_samples"):
            samples = chain.from_iterable(b.samples for b in benchmarks.values())
            logger.log_samples(sample_rows(folder, samples), trainer.global_step)
        if hasattr(logger, "log_evaluation"):
            logger.log_evaluation(folder, FILES)


def build_trainer(
    cfg: DictConfig, folder: Path, clip: float | None, during: EvaluateSlice
) -> pl.Trainer:
    """The Lightning trainer with the callbacks that watch over every run."""
    precision = cfg.trainer.precision
    if precision == "auto":
        cuda = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        fast = hardware_dtype("cuda" if cuda else "cpu")
        mixed = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
        precision = mixed.get(fast, "32-true")
    loggers = [build(node, folder=str(folder)) for node in cfg.logger.values()]
    checkpoints = Checkpoints(folder / "checkpoints", **cfg.checkpoint)
    watch = [checkpoints, Audit(), FiniteGuard(), GradNorms(), Throughput(), Progress()]
    return build(
        without(cfg.trainer, ["precision"]),
        precision=precision,
        default_root_dir=str(folder),
        callbacks=[*watch, during],
        logger=loggers,
        gradient_clip_val=clip,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def headline(results: dict[str, Any]) -> float | None:
    """The first metric's value."""
    return next((entry["value"] for entry in results["metrics"].values()), None)

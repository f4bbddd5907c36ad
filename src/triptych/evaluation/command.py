"""What `evaluate.py` and the end of training ask for: a predictor, benchmarks and settings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from triptych.build import OUR_KEYS, Adapted, build, build_model, is_remote, parts_asked, without
from triptych.bundle import find_bundle, load_bundle
from triptych.distributed import rank, wait
from triptych.evaluation.card.write import after_evaluation
from triptych.evaluation.contamination import watch_all
from triptych.evaluation.identity import config_facts, file_hashes
from triptych.evaluation.llm_judge import KEY
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.records import Results
from triptych.evaluation.runner import evaluate, rescore
from triptych.evaluation.store import FOLDER
from triptych.system import system_info
from triptych.types import DataError, TriptychError

SETTINGS = "evaluation.yaml"  # in each folder of results: benchmarks and settings, for `rescore`
ASKED = ("limit", "blind", "images", "scorer")


def load_predictor(
    cfg: DictConfig, overrides: Sequence[str]
) -> tuple[Predictor, dict[str, Any], DictConfig | None]:
    """The predictor of a run, a preset or a remote model, its identity, and the benchmarks."""
    if (cfg.run is None) == (cfg.model is None):
        raise TriptychError("give run=DIR to score a run, or model=NAME to score a preset.")
    chosen = cfg.get("benchmark")
    if cfg.run is None and is_remote(cfg.model):
        if not chosen:
            raise TriptychError(
                f"model={cfg.model.name} brings no benchmark; add benchmark=[easy_vqa] or others."
            )
        return build(without(cfg.model, OUR_KEYS)), {}, chosen
    if cfg.run is None:
        shaped, adapted = cfg, build_model(cfg, asked=parts_asked(overrides))
        identity = identity_of(cfg, adapted)
    else:
        bundle = find_bundle(cfg.run)
        if bundle is None:
            raise TriptychError(f"run={cfg.run} is no run: it holds no bundle/bundle.json.")
        shaped, adapted = load_bundle(bundle)
        identity = identity_of(shaped, adapted, bundle)
        chosen = chosen or shaped.get("benchmark")
    if shaped.model.get("device_map") is None:  # else the library has placed the weights
        adapted.model.to(_device(cfg.trainer.accelerator))
    processor = adapted.model.processor()
    return ModelPredictor(adapted.model, processor, cfg.eval.batch_size), identity, chosen


def identity_of(cfg: DictConfig, adapted: Adapted, bundle: Path | None = None) -> dict[str, Any]:
    """What is known of a model beside its weights: settings, bases, every byte of its bundle."""
    facts = config_facts(OmegaConf.to_container(cfg, resolve=True))
    files = {} if bundle is None else {"bundle": file_hashes(bundle)}
    return {"bases": adapted.bases, **files, "config": facts}


def build_benchmarks(nodes: DictConfig | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The benchmarks a configuration chose, and why others of several are left out."""
    made, left_out = {}, {}
    for name, node in (nodes or {}).items():
        try:
            made[str(name)] = build(node)
        except TriptychError as error:
            said = f"benchmark.{name}: {error}"
            if len(nodes) == 1 or not isinstance(error, DataError):
                raise type(error)(said) from error
            left_out[str(name)] = said
            print(f"{name}: left out, {error}", flush=True)
    if left_out and not made:
        raise DataError("; ".join(left_out.values()))
    return made, left_out


def score(
    cfg: DictConfig,
    predictor: Predictor,
    benchmarks: dict[str, Any],
    out: Path,
    identity: dict[str, Any] | None = None,
    nodes: DictConfig | None = None,
    left_out: dict[str, str] | None = None,
    before: Path | None = None,
) -> Results:
    """Run the benchmarks on a model; slices and permutations do not follow the training seed.

    nodes: the configuration of the benchmarks, `cfg.benchmark` unless given. before: where the
    same model was scored untuned; its answers stand beside the new ones.
    """
    if not benchmarks:
        return {"metrics": {}}
    settings = {key: cfg.eval[key] for key in ASKED if key in cfg.eval}
    if rank() == 0:
        if not cfg.eval.get("resume", True):
            _forget(out)
        out.mkdir(parents=True, exist_ok=True)
        asked = {"benchmark": cfg.benchmark if nodes is None else nodes, "eval": settings}
        asked |= {"run": cfg.get("run"), "clean": bool(cfg.eval.get("clean", False))}
        asked["judge"] = cfg.get("judge")
        OmegaConf.save(OmegaConf.create(asked), out / SETTINGS, resolve=True)
        if not (out / "system.json").exists():  # of a training run it holds more
            (out / "system.json").write_text(json.dumps(system_info(), indent=1, default=str))
    wait()
    set_decoding(benchmarks, cfg.eval, predictor)
    # before the model is asked: a judge without a key is told at once
    llm = build(cfg.judge) if cfg.get("judge") else None
    if cfg.eval.get("clean", False):
        benchmarks = watch_all(benchmarks, *_trained(cfg, out))
    results = evaluate(
        predictor,
        benchmarks,
        out,
        identity=identity,
        left_out=left_out or {},
        before=before,
        llm=llm,
        **settings,
    )
    if rank() == 0:
        after_evaluation(cfg, predictor, out, results["metrics"])
    return results


def set_decoding(benchmarks: dict[str, Any], settings: DictConfig, predictor: Predictor) -> None:
    """`eval.decoding` in every scorer that generates, before what the benchmark itself asks for."""
    asked = dict(settings.get("decoding") or {})
    if asked.get("num_beams", 1) == 1:
        return
    if hasattr(predictor, "respond"):
        raise TriptychError(
            "eval.decoding.num_beams searches in a model whose weights are here; a remote model "
            "takes its own fields in model.options."
        )
    for benchmark in benchmarks.values():
        for scorer in benchmark.scorers:
            if hasattr(scorer, "decoding"):
                scorer.decoding = {**scorer.decoding, **asked}


def _trained(cfg: DictConfig, out: Path) -> tuple[DictConfig | None, Path | None]:
    """What a model was trained with, and the run that knows; nothing of a preset."""
    if "run" not in cfg:
        return cfg, out.parent if out.name == "before" else out
    if cfg.run is None:
        return None, None
    return OmegaConf.load(find_bundle(cfg.run) / "config.yaml"), Path(cfg.run)


def rescore_folder(folder: Path, judge: DictConfig | None = None) -> tuple[Results, Results]:
    """Judge stored answers anew under the present rules: the results before, and after.

    judge: an LLM judge that is added, or takes the place of the one the folder had.
    """
    from triptych.evaluation.records import read_results

    path = folder / SETTINGS
    if not path.is_file():
        raise TriptychError(f"rescore={folder}: there is no {SETTINGS}; give a folder of results.")
    asked = OmegaConf.load(path)
    if judge is not None:
        asked.judge = judge
    before = read_results(folder)
    benchmarks, left_out = build_benchmarks(asked.benchmark)
    llm = None
    try:
        llm = build(asked.judge) if asked.get("judge") else None
    except TriptychError as error:
        if judge is not None:
            raise
        left_out |= {f"{name}/{KEY}": str(error) for name in benchmarks}  # no key: the rest stands
    if asked.get("clean", False):
        places = (folder, folder.parent, folder.parent.parent)  # a run, its before/, its eval/HASH
        runs = [p for p in places if (p / "bundle" / "config.yaml").is_file()]
        trained = OmegaConf.load(runs[0] / "bundle" / "config.yaml") if runs else None
        benchmarks = watch_all(benchmarks, trained, runs[0] if runs else None)
    after = rescore(benchmarks, folder, left_out=left_out, llm=llm, **asked.eval)
    if judge is not None:
        OmegaConf.save(asked, path)
    return before, after


def _device(accelerator: str) -> torch.device:
    """This process's own GPU where there is one and it is not refused, else the CPU."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _forget(out: Path) -> None:
    import shutil

    shutil.rmtree(out / FOLDER, ignore_errors=True)

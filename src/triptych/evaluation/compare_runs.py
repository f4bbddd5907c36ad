"""Evaluated runs, read from folders, sweeps or a W&B project; no model is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.evaluation.identity import digest
from triptych.evaluation.records import read_results
from triptych.rundir import slug
from triptych.types import TriptychError

WANDB = "wandb:"
ARTIFACT = "evaluation"  # type of the W&B artifact that holds these files
FILES = ("results.json", "samples.parquet", "config.yaml", "evaluation.yaml", "timing.json")
# Settings that change no number, or only where and how often one is looked at.
IDLE = ("seed", "ckpt", "logger", "hydra", "dry_run", "checkpoint", "benchmark", "cache", "eval")
Row = dict[str, Any]


@dataclass
class EvaluatedRun:
    """One run's numbers, its rows a sample by (benchmark, scorer), and its settings."""

    name: str
    metrics: dict[str, Row]
    rows: dict[tuple[str, str], dict[str, Row]]
    settings: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    nodes: Any = None  # configuration of its benchmarks, for pictures
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that make the numbers, without the seed."""
        return {k: v for k, v in self.settings.items() if k.split(".")[0] not in IDLE}

    def samples(self, key: str) -> dict[str, Row]:
        """The rows behind a metric, by sample id; those of its slice alone."""
        bench, _, part = split_key(key)
        rows = self.rows.get((bench, self.metrics[key].get("scorer", "")), {})
        return {k: r for k, r in rows.items() if not part or r.get("slice") == part}


def split_key(key: str) -> tuple[str, str, str]:
    """Benchmark, metric and slice of `bench/metric[/slice][@scorer]`."""
    bench, metric, part = (*key.split("@")[0].split("/", 2), "", "")[:3]
    return bench, metric, part


def load_runs(sources: Sequence[str], scratch: Path) -> list[EvaluatedRun]:
    """The runs behind folders, sweeps and `wandb:ENTITY/PROJECT[/RUN]`, each under its own name.

    scratch: where files of W&B artifacts are downloaded to.
    """
    folders: list[Path] = []
    for source in sources:
        found = _from_wandb(source, scratch) if source.startswith(WANDB) else _local(Path(source))
        folders += [folder for folder in found if folder not in folders]
    names = _short_names(folders)
    return [load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def load_run(folder: Path, name: str) -> EvaluatedRun:
    """One folder of results, and those of `eval/` below it that asked everything."""
    results = read_results(folder)
    run = EvaluatedRun(name, dict(results["metrics"]), {}, left_out=results.get("left_out", {}))
    run.rows = _rows(folder)
    run.settings = _settings(folder)
    asked = [_yaml(folder / name).get("benchmark") for name in ("evaluation.yaml", "config.yaml")]
    run.nodes = asked[0] or asked[1]
    for more in sorted((folder / "eval").glob("*/results.json")):
        asked = _yaml(more.parent / "evaluation.yaml").get("eval", {})
        if asked.get("images", "own") == "own" and asked.get("limit") is None:
            new = {k: r for k, r in _rows(more.parent).items() if k not in run.rows}
            run.rows |= new
            nodes = _yaml(more.parent / "evaluation.yaml").get("benchmark") or {}
            run.nodes = {**nodes, **(run.nodes or {})}
    return run


def evaluate_sources(
    sources: Sequence[str], benchmarks: str, options: Sequence[str], out: Path
) -> list[str]:
    """Evaluate runs and presets on the same benchmarks, each in a process of its own.

    A source that is no folder is a preset, such as `gpt4v` or `gpt4v:gpt-4o-2024-08-06`; options of
    its own may stand behind either, separated by spaces. Returns the folders of results; what
    fails is told and left out: the others still stand in one table.
    """
    from triptych.bundle import model_options
    from triptych.config_check import quoted

    folders = []
    for source in sources:
        name, *own = [source] if Path(source).is_dir() else source.split()
        folder = out / "runs" / _folder_name(name, own)
        asked = [f"run={quoted(name)}"] if Path(name).is_dir() else model_options(name)
        asked += [f"benchmark=[{benchmarks}]", *options, *own]
        command = [sys.executable, "-m", "triptych.evaluation", *asked]
        done = subprocess.run([*command, f"hydra.run.dir={quoted(folder)}"], stderr=subprocess.PIPE)
        if done.returncode == 0:
            folders.append(str(folder))
            continue
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        print(f"{source}: left out, {lines[-1] if lines else 'it failed'}", flush=True)
    if not folders:
        raise TriptychError("none of the runs could be evaluated; the reasons stand above.")
    return folders


def _folder_name(name: str, own: Sequence[str]) -> str:
    """What the tables call a source: its last part, told from others that end alike by a hash."""
    run = Path(name).is_dir()
    preset, separator, ident = name.partition(":")
    if not (run or separator or own):
        return slug(name)
    whole = " ".join([str(Path(name).resolve()) if run else name, *own])
    short = Path(name).resolve().name if run else f"{preset}-{Path(ident).name}".rstrip("-")
    return f"{slug(short)}-{digest(whole)[:6]}"


def _local(folder: Path) -> list[Path]:
    """The folder itself, or the runs of a sweep below it."""
    if (folder / "results.json").is_file():
        return [folder]
    below = sorted(p.parent for p in folder.glob("*/results.json")) or sorted(
        p.parent for p in folder.glob("*/*/results.json")
    )
    if not below:
        raise TriptychError(
            f"'{folder}' holds no results.json, and no run below it does; give evaluated runs."
        )
    return below


def _from_wandb(source: str, scratch: Path) -> list[Path]:
    """Download the evaluation of every run of a project, or of one run."""
    import wandb

    path = source.removeprefix(WANDB).strip("/")
    try:
        api = wandb.Api()
        runs = [api.run(path)] if path.count("/") == 2 else list(api.runs(path))
        folders = [_download(run, scratch) for run in runs]
    except (wandb.errors.Error, ValueError, OSError) as error:
        words = " ".join(str(error).split())
        raise TriptychError(
            f"{source} cannot be read from W&B ({words[:200]}); check the path and the key, or "
            "give local folders: they need no server."
        ) from error
    found = [folder for folder in folders if folder is not None]
    if not found:
        raise TriptychError(
            f"no run of {source} has an artifact of type '{ARTIFACT}'; train with logger=wandb."
        )
    return found


def _download(run: Any, scratch: Path) -> Path | None:
    held = [a for a in run.logged_artifacts() if a.type == ARTIFACT]
    if not held:
        print(f"{run.name}: left out, it has no artifact of type '{ARTIFACT}'", flush=True)
        return None
    folder = scratch / f"{run.name}-{run.id}"
    held[-1].download(root=str(folder))
    if not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text(json.dumps(dict(run.config)), encoding="utf-8")
    return folder


def _rows(folder: Path) -> dict[tuple[str, str], dict[str, Row]]:
    import pyarrow.parquet as pq

    path = folder / "samples.parquet"
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in pq.read_table(path).to_pylist() if path.exists() else []:
        found.setdefault((row["benchmark"], row["scorer"]), {})[row["sample_id"]] = row
    return found


def _settings(folder: Path) -> dict[str, Any]:
    """The training configuration, dotted, and the image setting of the evaluation."""
    asked = _yaml(folder / "evaluation.yaml")
    places = [folder / "config.yaml"]
    if folder.parent.name == "eval":
        places.append(folder.parent.parent / "config.yaml")
    if asked.get("run"):
        places += [Path(asked["run"]) / name for name in ("config.yaml", "bundle/config.yaml")]
    flat = next((dict(_leaves(_yaml(p))) for p in places if p.is_file()), {})
    return flat | {"images": asked.get("eval", {}).get("images", "own")}


def _yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; RUN/eval/HASH keeps its run."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    longest = max(len(p) for p in parts)
    for size in range(1, longest + 1):
        names = ["/".join(p[-size - 2 * (p[-2:-1] == ("eval",)) :]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return names

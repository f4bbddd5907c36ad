"""The evaluator: one call for every model and every benchmark, in training and after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from triptych.distributed import rank, share
from triptych.evaluation.asking import ask, batches_of
from triptych.evaluation.benchmark import Benchmark
from triptych.evaluation.gallery import write_gallery
from triptych.evaluation.identity import inference_facts, model_facts
from triptych.evaluation.judging import Judged, judge
from triptych.evaluation.llm_judge import LlmJudge
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.records import (
    Results,
    read_answers,
    read_results,
    write_json,
    write_samples,
)
from triptych.evaluation.scorers import Outcome, Scorer, able
from triptych.evaluation.store import FOLDER, Answers, stored_answers
from triptych.evaluation.task import Settings, Task
from triptych.hardware import peak_ram
from triptych.rundir import slug
from triptych.types import Sample, TriptychError

Identity = Mapping[str, Any]


def evaluate(
    predictor: Predictor,
    benchmarks: dict[str, Benchmark],
    out: Path | None,
    *,
    identity: Identity | None = None,
    left_out: Mapping[str, str] | None = None,
    before: Path | None = None,
    llm: LlmJudge | None = None,
    progress: bool = True,
    **settings: Any,
) -> Results:
    """Score a model on benchmarks and leave results, times, records and galleries in `out`.

    settings: those of `Settings`. identity: what is known of the model beside its weights, such as
    the hashes of its bundle. Answers are kept in `out` as they come: the same call goes on where
    a killed one stopped, and ends in the same bytes; several processes share the work. With
    out=None nothing is written and every process asks for itself. Of several benchmarks, those that
    the model cannot do are left out, and the results say so beside what the caller had to leave
    out. before: a folder that an earlier call wrote, whose answers stand beside the new ones. llm:
    a judge of answers in free words. No outcome depends on the batch size.
    """
    chosen = Settings(**settings)
    say = partial(print, flush=True) if progress and rank() == 0 else _silent
    facts = {} if out is None else {**model_facts(predictor), **(identity or {})}
    runs: list[Judged] = []
    left_out = dict(left_out or {})
    for name, benchmark in benchmarks.items():
        try:
            scorers = able(benchmark.scorers, predictor, name, chosen.scorer)
        except TriptychError as error:
            if len(benchmarks) == 1 and not left_out:
                raise
            left_out[name] = str(error)
            say(f"{name}: left out, {error}")
            continue
        task = Task(name, benchmark, chosen)
        for scorer, suffix in scorers:
            runs.append(_asked(task, scorer, suffix, predictor, out, facts, llm, say))
    if not runs:
        raise TriptychError("; ".join(left_out.values()) or "there is no benchmark to run.")
    return share(_write(runs, left_out, out, chosen.seed, before=before) if rank() == 0 else None)


def rescore(
    benchmarks: dict[str, Benchmark],
    out: Path,
    left_out: Mapping[str, str] | None = None,
    llm: LlmJudge | None = None,
    **settings: Any,
) -> Results:
    """Judge the answers that are stored in `out` anew, with no model; same answers, same bytes."""
    chosen = Settings(**settings)
    folder = out / FOLDER
    headers = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    order = {name: number for number, name in enumerate(benchmarks)}
    own = [h for h in headers if h["part"] == "own" and h["benchmark"] in order]
    if not own:
        raise TriptychError(f"{out} holds no stored answers ({FOLDER}/); evaluate it first.")
    runs = []
    for header in sorted(own, key=lambda h: (order[h["benchmark"]], h["suffix"])):
        task = Task(header["benchmark"], benchmarks[header["benchmark"]], chosen)
        outcomes = stored_answers(folder, header["file"], [s.id for s in task.samples])
        rows, permuted = task.blind()
        seen: list[Outcome] = []
        if permuted:
            seen = stored_answers(folder, f"{header['file']}.blind", [s.id for s in permuted])
        runs.append(judge(task, header, outcomes, rows, permuted, seen, llm))
    there, stored = {header["benchmark"] for header in own}, read_results(out)
    said = {k: v for k, v in stored.get("left_out", {}).items() if k.split("/")[0] not in there}
    others = {k: v for k, v in stored["metrics"].items() if k.split("/")[0] not in there}
    before = out / "before" if (out / "before" / "samples.parquet").exists() else None
    return _write(runs, said | dict(left_out or {}), out, chosen.seed, others, before)


def _asked(
    task: Task,
    scorer: Scorer,
    suffix: str,
    predictor: Predictor,
    out: Path | None,
    facts: Identity,
    llm: LlmJudge | None,
    say: Callable[[str], None],
) -> Judged:
    """Ask the model, then ask it again with permuted images, and judge both."""
    name = task.name
    say(f"{name}: {len(task.samples):,} questions, scorer {scorer.name}")
    for note in getattr(task.benchmark, "notes", ()):
        say(f"{name}: {note}")
    header = {
        "benchmark": name,
        "suffix": suffix,
        "scorer": scorer.name,
        "part": "own",
        "file": slug(name + suffix),
        "batch_size": predictor.batch_size,
    }

    def answers(samples: list[Sample], part: str, label: str) -> tuple[list[Outcome], dict]:
        if hasattr(predictor, "forecast"):
            say(predictor.forecast(samples, scorer))
        batches = batches_of(scorer, predictor, samples)
        store = None
        if out is not None:
            known = header | {"part": part} | inference_facts(facts, scorer, samples)
            file = header["file"] + ("" if part == "own" else f".{part}")
            ids = [s.id for s in samples]
            store = Answers(out / FOLDER, file, known | {"file": file}, ids, batches)
            header.update(known if part == "own" else {})
        return ask(scorer, predictor, samples, batches, store, label, say is not _silent)

    outcomes, timing = answers(task.samples, "own", name)
    rows, permuted = task.blind()
    seen: list[Outcome] = []
    if permuted:
        say(f"{name}: blind (images permuted) on {len(permuted):,} of them")
        seen, timing["blind"] = answers(permuted, "blind", f"{name} blind")
    if rank() > 0:
        return Judged([], [], {}, {}, suffix)
    run = judge(task, header, outcomes, rows, permuted, seen, llm)
    run.timing = timing
    return run


def _write(
    runs: Sequence[Judged],
    left_out: Mapping[str, str],
    out: Path | None,
    seed: int,
    others: Mapping[str, Any] | None = None,
    before: Path | None = None,
) -> Results:
    """The results of all runs, written to `out` with their records, times and pictures.

    others: metrics of benchmarks that are in the file already and stay there.
    """
    metrics = {k: v for run in runs for k, v in run.metrics.items()}
    results: Results = {"metrics": {**(others or {}), **metrics}}
    said = dict(left_out) | {k: v for run in runs for k, v in run.left_out.items()}
    if said:
        results["left_out"] = said
    if out is None:
        return results
    out.mkdir(parents=True, exist_ok=True)
    named = {run.facts["inference"]["file"]: run for run in runs}
    if any(run.timing for run in runs):
        timing = {name: run.timing for name, run in named.items()}
        write_json(out / "timing.json", {"benchmarks": timing, **peak_memory()})
    write_json(out / "provenance.json", {name: run.facts for name, run in named.items()})
    records = [row for run in runs for row in run.records]
    if before is not None:
        earlier = read_answers(before)
        for record in records:
            record["before"] = earlier.get((record["benchmark"], record["sample_id"]))
    write_samples(out / "samples.parquet", records)
    first = [run for run in runs if not run.suffix] or runs
    images = {s.id: s.images for run in first for s in run.samples}
    write_gallery(out, [row for run in first for row in run.records], images, seed)
    write_json(out / "results.json", results)
    return results


def peak_memory() -> dict[str, int]:
    """The most bytes this process ever held, in RAM and on the GPU if there is one."""
    peak = {"peak_ram_bytes": peak_ram()}
    if torch.cuda.is_available():
        peak["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _silent(text: str) -> None:
    """Say nothing."""

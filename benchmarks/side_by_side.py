"""Runs two or more programs in turn, each in a fresh process, and says how they compare.

A benchmark states its variants and a function that measures one of them. `main` first asks for the
parity check (the same loss on the same weights and data, or the same answers) in a process of its
own, then runs A B A B ..., prints a table and writes `results/NAME.json`. Nothing here asserts a
time: ratios are taken within a round and given as median with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


class Memory:
    """Peak resident memory above what the process held at the start of the `with` block."""

    added_mib = 0.0

    def __enter__(self) -> Memory:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.added_mib = (_status("VmHWM") - self._before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))  # KiB


def gemm_gflops(size: int = 2048, seconds: float = 1.0) -> float:
    """Median GFLOP/s of a large float32 product with this process's threads."""
    import torch

    one, other = torch.randn(size, size), torch.randn(size, size)
    out, times, end = torch.empty(size, size), [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(one, other, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def machine(threads: int) -> Result:
    """What the numbers depend on; `load` says how quiet the machine was when the run began."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "peft", "trl", "open_clip_torch", "pytorch-lightning"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "niceness": os.nice(0),
        "versions": versions,
    }


def parser(text: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=text.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, one round")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--only", nargs="*", default=None, help="variants to run")
    made.add_argument("--one", default=None, help=argparse.SUPPRESS)
    return made


def main(
    name: str,
    args: argparse.Namespace,
    variants: Sequence[str],
    check: Callable[[argparse.Namespace], Result] | None,
    measure: Callable[[str, argparse.Namespace], Result],
    against: str,
) -> None:
    """Run one variant (`--one`), or all of them in turn and compare with `against`."""
    if args.one is not None:
        _threads(args.threads)
        run = check(args) if args.one == "check" else measure(args.one, args)
        print("RESULT " + json.dumps(run), flush=True)
        return
    chosen = [v for v in variants if args.only is None or v in (*args.only, against)]
    report: Result = {"name": name, "quick": args.quick, "machine": machine(args.threads)}
    report["options"] = {k: v for k, v in vars(args).items() if k not in ("one", "only")}
    if check is not None:
        report["parity"] = _fresh("check")
        print("parity: " + ", ".join(f"{k} {v}" for k, v in report["parity"].items()), flush=True)
    runs: dict[str, list[Result]] = {v: [] for v in chosen}
    for number in range(1 if args.quick else args.rounds):
        for variant in chosen:
            runs[variant].append(_fresh(variant))
            print(f"round {number + 1}  {_line(variant, runs[variant][-1])}", flush=True)
    report["runs"], report["against"] = runs, against
    report["ratios"] = {v: ratio(runs[v], runs[against]) for v in chosen if v != against}
    print()
    for variant, (middle, low, high) in report["ratios"].items():
        print(f"{variant:28s} {middle:6.2f} x {against} [{low:.2f}-{high:.2f}]")
    for field, says in (("losses", "loss curves differ by at most"), ("answers", "same answers:")):
        if all(field in run for found in runs.values() for run in found):
            report[field] = agreement(field, runs, against)
            print(says, report[field])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'_quick' if args.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"written: {path}")


def ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios of speed within each round."""
    found = [a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(found), min(found), max(found)


def agreement(field: str, runs: dict[str, list[Result]], against: str) -> Any:
    """The largest difference of loss curves to those of `against`, or whether answers are equal."""
    reference = runs[against][0][field]
    every = [run[field] for found in runs.values() for run in found]
    if field == "answers":
        return all(answers == reference for answers in every)
    return max(abs(a - b) for one in every for a, b in zip(one, reference, strict=True))


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _fresh(variant: str) -> Result:
    """One variant in a process of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *sys.argv, "--one", variant]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def _line(variant: str, run: Result) -> str:
    words = [f"{variant:28s}", f"{run['rate']:10.2f} {run.get('unit', 'samples/s')}"]
    if "tokens_per_s" in run:
        words.append(f"{run['tokens_per_s']:9.0f} tokens/s")
    if "added_mib" in run:
        words.append(f"+{run['added_mib']:6.0f} MiB")
    if "mfu" in run:
        words.append(f"{run['gflops']:5.1f} GFLOP/s = {run['mfu']:.0%} of GEMM {run['gemm']:.0f}")
    words += [f"{k} {v:.2f}" for k, v in run.get("more", {}).items()]
    return "  ".join(words)


def finished(
    samples: int,
    seconds: float,
    tokens: int | None = None,
    added_mib: float | None = None,
    flops: float | None = None,
    **more: Any,
) -> Result:
    """One measurement; `flops` are those of the work as this variant does it."""
    run: Result = {"rate": samples / seconds, "samples": samples, "seconds": seconds, **more}
    if tokens is not None:
        run["tokens_per_s"] = tokens / seconds
    if added_mib is not None:
        run["added_mib"] = added_mib
    if flops is not None:
        run["gemm"] = gemm_gflops()
        run["gflops"] = flops / seconds / 1e9
        run["mfu"] = run["gflops"] / run["gemm"]
    return run

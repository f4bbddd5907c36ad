"""The report of a run: `python -m triptych.evaluation.report run=DIR images=FOLDER`.

Writes DIR/report/report.md and report.html: 10 images x 3 prompts with answers, and failure cases
of the stored evaluation, each with a hypothesis and what supports it. Options: out=DIR,
prompts="a|b|c", count=10 (images), failures=8, max_new_tokens=48.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych.options import read_options, run_tool, whole_number
from triptych.types import TriptychError

OPTIONS = ("run", "images", "out", "prompts", "count", "failures", "max_new_tokens")
LEAST = 5  # failure cases a report is to hold


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one sentence if something is missing."""
    return run_tool(_run, __doc__, argv)


def _run(words: Sequence[str]) -> int:
    print("\n".join(map(str, make(_options(words)))))
    return 0


def make(options: dict[str, str]) -> list[Path]:
    """Ask, explain, write."""
    from triptych.api import load
    from triptych.evaluation.report.gather import (
        PROMPTS,
        ask_folder,
        evaluate_now,
        find_failures,
        stored_records,
    )
    from triptych.evaluation.report.page import Report, write

    run = Path(options["run"])
    out = Path(options.get("out", run / "report"))
    prompts = [p.strip() for p in options.get("prompts", "|".join(PROMPTS)).split("|") if p.strip()]
    count, failures, longest = (
        whole_number(options, name, default)
        for name, default in (("count", 10), ("failures", 8), ("max_new_tokens", 48))
    )
    loaded = load(run)
    asked, how = ask_folder(loaded, Path(options["images"]), prompts, count, longest)
    folder = stored_records(run) or evaluate_now(loaded, run, out)
    found = find_failures(folder, run, max(LEAST, failures))
    notes = ["Hypotheses are rules over each record; they say what fits, not what is proven."]
    if len(asked) < count:
        notes.append(f"The folder holds {len(asked)} readable images; {count} were asked for.")
    if len(found.cases) < LEAST:
        notes.append(f"The evaluation has {found.failures} failures, so fewer than {LEAST} cases.")
    facts = {
        "run": run.name,
        "model": str(loaded.cfg.model.name),
        "records": f"{found.records:,} answers in {folder.name}, {found.failures:,} of them wrong",
        **_headlines(folder),
    }
    report = Report(f"Report of {run.name}", facts, prompts, asked, how, found, notes)
    return write(report, out)


def _headlines(folder: Path) -> dict[str, str]:
    from triptych.evaluation.records import read_results

    metrics: dict[str, Any] = read_results(folder)["metrics"]
    chosen = {key: entry for key, entry in metrics.items() if key.count("/") == 1}
    made = {}
    for key, entry in list(chosen.items())[:12]:
        text = f"{100 * entry['value']:.1f} %"
        if entry.get("low") is not None:
            text += f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        for name in ("chance", "blind"):
            text += f", {name} {100 * entry[name]:.1f}" if entry.get(name) is not None else ""
        made[key] = text
    return made


def _options(words: Sequence[str]) -> dict[str, str]:
    options = read_options(words, OPTIONS)
    for name in ("run", "images"):
        if name not in options:
            raise TriptychError(f"{name}= is missing: give run=DIR images=FOLDER.")
    return options


if __name__ == "__main__":
    sys.exit(main())

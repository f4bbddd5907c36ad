"""Writes what the benchmarks measured into docs/performance.md, between its marks.

python benchmarks/table.py            renders every results/*.json (not the quick ones)
python benchmarks/table.py --quick    those of smoke runs, to look at the layout; prints only
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

RESULTS, PAGE = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs/performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TITLES = {
    "instruct": "Instruction tuning with LoRA, easy-VQA, ten questions an image",
    "instruct_ablation": "The same, each optimisation off against on",
    "instruct_varied1": "Texts of 5 to 300 tokens, one question an image",
    "instruct_varied8": "Texts of 5 to 300 tokens, eight questions an image",
    "instruct_varied8_ablation": "The same, single optimisations off against on",
    "contrastive": "Contrastive, captions of 8 to 12 tokens",
    "contrastive_full": "Contrastive, captions that fill the context",
    "evaluate": "Answering easy-VQA questions",
    "data": "JPEG 1024 x 768 to 224 pixels",
    "data_png": "PNG 64 x 64",
    "startup": "Start-up",
    "profile": "Profile of the training step",
}


def render(report: dict) -> str:
    """One benchmark as a heading, a line about the machine, and a table."""
    name, host = report["name"], report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items() if v != "-")
    lines = [
        f"### {TITLES.get(name, name)}",
        "",
        f"{host['date']}, {host['cpu']}, {host['threads']} threads of {host['cores']} cores, load "
        f"{host['load']} and niceness {host['niceness']} at the start; {versions}.",
        "",
    ]
    if name == "startup":
        return "\n".join([*lines, *_seconds(report)])
    if name == "profile":
        return "\n".join([*lines, *_profile(report)])
    if report.get("parity"):
        words = ", ".join(f"{k} {_number(v)}" for k, v in report["parity"].items())
        lines += [f"Checked first: {words}.", ""]
    lines += [*_runs(report)]
    return "\n".join(lines)


def _runs(report: dict) -> list[str]:
    runs, against = report["runs"], report["against"]
    unit = next(iter(runs.values()))[0].get("unit", "samples/s")
    columns = ["variant", unit, f"x {against} [min-max]"]
    optional = {"tokens_per_s": "tokens/s", "added_mib": "+ MiB", "mfu": "share of GEMM"}
    there = [k for k in optional if any(k in r for found in runs.values() for r in found)]
    columns += [optional[k] for k in there]
    padded = any("more" in r for found in runs.values() for r in found)
    columns += ["padding"] * padded
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for variant, found in runs.items():
        middle, low, high = report["ratios"].get(variant, (1, 1, 1))
        cells = [variant, f"{_median(found, 'rate'):.4g}"]
        cells.append("1" if variant == against else f"**{middle:.2f}** [{low:.2f}-{high:.2f}]")
        for key in there:
            value = _median(found, key)
            form = f"{value:.0%}" if key == "mfu" else f"{value:,.0f}"
            cells.append("" if value is None else form)
        if padded:
            cells.append(f"{found[0].get('more', {}).get('padding', 0):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _seconds(report: dict) -> list[str]:
    lines = ["| what | seconds [min-max] |", "|---|---|"]
    for name, found in report["seconds"].items():
        lines.append(
            f"| {name} | {statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}] |"
        )
    return lines


def _profile(report: dict) -> list[str]:
    lines = ["| item | share of the step | calls a step | what |", "|---|---|---|---|"]
    for row in report["rows"]:
        lines.append(f"| `{row['name']}` | {row['share']:.1%} | {row['calls']:g} | {row['what']} |")
    return [*lines, "", report["summary"]]


def _median(found: list[dict], key: str) -> float | None:
    values = [r[key] for r in found if key in r]
    return statistics.median(values) if values else None


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    quick = "--quick" in sys.argv
    reports = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    order = list(TITLES)
    chosen = sorted(
        (r for r in reports if r["quick"] == quick),
        key=lambda r: order.index(r["name"]) if r["name"] in order else len(order),
    )
    text = "\n\n".join(render(r) for r in chosen)
    if quick or not chosen:
        print(text or "there are no results; run the benchmarks first.")
        return
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    print(f"written: {PAGE} ({len(chosen)} tables)")


if __name__ == "__main__":
    main()

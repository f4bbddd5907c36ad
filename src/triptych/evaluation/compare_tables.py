"""The tables of a comparison: a row a run, and a row a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from triptych.evaluation.compare_runs import EvaluatedRun, Row, split_key

if TYPE_CHECKING:
    from triptych.evaluation.compare import Difference


def headline(key: str) -> bool:
    """Whether a metric is of all samples, under a benchmark's first scorer."""
    return not split_key(key)[2] and "@" not in key


def score_rows(runs: Sequence[EvaluatedRun]) -> list[Row]:
    """A row a headline metric and run: value, interval, and what chance and blindness reach."""
    keys = list(dict.fromkeys(k for run in runs for k in run.metrics if headline(k)))
    rows = []
    for key in keys:
        for run in (r for r in runs if key in r.metrics):
            entry = run.metrics[key]
            rows.append(
                {
                    "metric": key,
                    "run": run.name,
                    "scorer": entry.get("scorer"),
                    "n": entry.get("n"),
                    "value": percent(entry.get("value")) + interval(entry),
                    **{name: percent(entry.get(name)) for name in ("chance", "prior", "blind")},
                    "unparsed": percent(entry.get("unparsed")),
                    "uses images": {True: "yes", False: "no"}.get(entry.get("uses_images"), "-"),
                }
            )
    return rows


def difference_rows(found: Sequence[Difference]) -> list[Row]:
    """A row a difference, in percentage points."""
    return [
        {
            "metric": d.metric,
            "run": d.b,
            "against": d.a,
            "verdict": d.verdict,
            "difference": percent(d.difference, sign="+") + interval(asdict(d), sign="+"),
            "p": _p(d.p_holm),
            "n": d.n,
            "images": d.images,
            "wins": len(d.wins),
            "losses": len(d.losses),
            "note": d.note,
        }
        for d in found
    ]


def text_table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns."""
    names = list(rows[0])
    cells = [names, *([str(row[n]) if row[n] is not None else "-" for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def percent(value: float | None, sign: str = "") -> str:
    """A share in percent; "-" if there is none."""
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def interval(entry: Row, sign: str = "") -> str:
    """The bounds behind a value; nothing if there are none."""
    low, high = entry.get("low"), entry.get("high")
    known = low is not None and high is not None and low == low and high == high
    return f" [{percent(low, sign)}, {percent(high, sign)}]" if known else ""


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"

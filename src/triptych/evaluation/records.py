"""What an evaluation leaves: results, times, and a row a question, each written in one move."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from triptych.types import Sample

# {"metrics": {"easy_vqa/accuracy": {"value": ...}}, "left_out": {"docvqa": "why"}}
Results = dict[str, dict[str, Any]]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whose bytes depend on the content alone; readers never see half a file."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_results(folder: Path) -> Results:
    """The results of a folder; empty if there are none yet."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"metrics": {}}


def merge_results(path: Path, results: Results) -> Results:
    """Add `results` to the file at `path`, newer numbers replacing older ones of the same key."""
    merged: Results = {"metrics": {}}
    if path.exists():
        merged = json.loads(path.read_text(encoding="utf-8"))
    merged["metrics"] = {**merged["metrics"], **results["metrics"]}
    new = {key.split("/")[0] for key in results["metrics"]}
    said = {k: v for k, v in merged.pop("left_out", {}).items() if k.split("/")[0] not in new}
    if said | results.get("left_out", {}):
        merged["left_out"] = said | results.get("left_out", {})
    write_json(path, merged)
    return merged


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """samples.parquet: the records as rows; a column is there if any record has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for record in records for name in record))
    columns = [pa.array([record.get(name) for record in records]) for name in names]
    columns = [c.cast(pa.string()) if pa.types.is_null(c.type) else c for c in columns]
    beside = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns, names=names), beside, compression="zstd")
    os.replace(beside, path)


def read_answers(folder: Path) -> dict[tuple[str, str], str]:
    """The raw answers of an evaluation, by benchmark and sample id."""
    import pyarrow.parquet as pq

    columns = ["benchmark", "sample_id", "raw_output"]
    rows = pq.read_table(folder / "samples.parquet", columns=columns).to_pylist()
    return {(row["benchmark"], row["sample_id"]): row["raw_output"] for row in rows}


def format_table(results: dict[str, Results]) -> str:
    """Several results side by side, a row a metric, in percent with the 95 % interval.

    `results` maps a label ("before", "after", a run's name) to a results dict. Baselines are those
    of the last results that have them. Below stands what was left out, and why.
    """
    keys = list(dict.fromkeys(key for r in results.values() for key in r["metrics"]))
    entries = [entry for r in results.values() for entry in r["metrics"].values()]
    beside = ["prior", "blind", "chance"] + ["ceiling"] * any("ceiling" in e for e in entries)
    rows = [["metric", "n", *results, *beside]]
    for key in keys:
        entries = [r["metrics"].get(key, {}) for r in results.values()]
        merged = {k: v for entry in entries for k, v in entry.items() if v is not None}
        row = [key, f"{merged['n']:,}", *map(_with_interval, entries)]
        rows.append(row + [_percent(merged.get(name)) for name in beside])
    said = {k: v for r in results.values() for k, v in r.get("left_out", {}).items()}
    lines = [f"{name} was left out: {why}" for name, why in said.items()]
    return "\n".join([_aligned(rows, left=1), *lines])


def runs_table(results: dict[str, Results]) -> str:
    """Several runs in one table, a row a metric and run, with its scorer and baselines."""
    rows = [["metric", "run", "scorer", "n", "value", "prior", "blind", "chance"]]
    for key in dict.fromkeys(key for r in results.values() for key in r["metrics"]):
        for label, result in results.items():
            entry = result["metrics"].get(key)
            if entry is not None:
                beside = [_percent(entry.get(name)) for name in rows[0][5:]]
                about = [key, label, entry.get("scorer", "-"), f"{entry['n']:,}"]
                rows.append([*about, _with_interval(entry), *beside])
    return _aligned(rows, left=3)


def _aligned(rows: list[list[str]], left: int) -> str:
    """Rows in columns, the first `left` of them flush left, with a line below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i >= left else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _with_interval(entry: dict[str, Any]) -> str:
    if entry.get("value") is None:
        return "-"
    if entry.get("low") is None:
        return _percent(entry["value"])
    return f"{_percent(entry['value'])} [{_percent(entry['low'])}, {_percent(entry['high'])}]"


def sample_rows(folder: Path, samples: Iterable[Sample], count: int = 50) -> list[dict[str, Any]]:
    """Rows with a picture for a table of predictions: failures first, then the others, seeded."""
    import random

    import pyarrow.parquet as pq

    path = folder / "samples.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    random.Random(0).shuffle(rows)
    failed = [row for row in rows if not row["correct"]][:count]
    chosen = failed + [row for row in rows if row["correct"]][:count]
    wanted = {row["sample_id"] for row in chosen}
    pictures = {s.id: s.images[0] for s in samples if s.id in wanted and s.images}
    keys = ("sample_id", "question", "gold", "raw_output", "parsed", "correct", "scorer")
    return [
        {"image": ref and ref.open(), **{key: row[key] for key in keys}}
        for row in chosen
        for ref in [pictures.get(row["sample_id"])]
    ]

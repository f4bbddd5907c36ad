"""The card's rows from stored results, and the table in Markdown and HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.evaluation.metrics import paired_compare
from triptych.types import TriptychError

Entry = Mapping[str, Any]
CARD_FILE = "card.json"  # beside results.json: the facts of the model that was scored

# column -> the key of its headline, and the field of a record that holds its score a sample
COLUMNS = {
    "generation": ("card_generation/object_f1", "object_f1"),
    "reading": ("card_reading/accuracy", "correct"),
    "counting": ("card_reasoning/accuracy/counting", "correct"),
    "comparison": ("card_reasoning/accuracy/comparison", "correct"),
    "relation": ("card_reasoning/accuracy/relation", "correct"),
    "retrieval": ("card_retrieval/accuracy", "correct"),
    "hallucination": ("card_hallucination/accuracy", "correct"),
}
GRADED = {
    "generation": "card_generation/object_f1",
    "reading": "card_reading/accuracy",
    "reasoning": "card_reasoning/accuracy",
    "retrieval": "card_retrieval/accuracy",
    "hallucination": "card_hallucination/accuracy",
}


@dataclass
class Row:
    """One model: its facts, every metric of its results, and its scores a sample if stored."""

    facts: dict[str, Any]
    metrics: dict[str, Entry]
    folder: Path
    baseline: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # column -> Comparison with the baseline

    @property
    def label(self) -> str:
        return str(self.facts["label"])

    def entry(self, key: str) -> Entry | None:
        """A metric's entry, or None where the model has none."""
        entry = self.metrics.get(key)
        return entry if entry and entry.get("value") is not None else None


def read_row(folder: Path, baseline: bool = False) -> Row:
    """The row of one evaluation: `results.json` with `card.json` beside it."""
    results = folder / "results.json"
    if not results.is_file():
        raise TriptychError(
            f"'{folder}' holds no results.json; run evaluate.py with benchmark=[card] first."
        )
    metrics = json.loads(results.read_text(encoding="utf-8"))["metrics"]
    if not any(key in metrics for key, _ in COLUMNS.values()):
        raise TriptychError(
            f"'{folder}' was not scored on the card; run evaluate.py run=... benchmark=[card]."
        )
    facts = {"label": folder.name, "family": "", "licence": "not stated here"}
    facts |= {"openness": "unknown", "parameters": None}
    if (folder / CARD_FILE).is_file():
        facts |= json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    return Row(facts, metrics, folder, baseline)


def compare_rows(before: Row, after: Row) -> dict[str, Any]:
    """What changed from `before` to `after` in each column: paired on common samples.

    A change whose interval lies below zero is forgetting. Columns whose records are not stored on
    both sides, or were answered by another scorer, are left out: those do not compare.
    """
    made = {}
    for column, (key, value) in COLUMNS.items():
        one, two = before.entry(key), after.entry(key)
        if one is None or two is None or one.get("scorer") != two.get("scorer"):
            continue
        a, b = _scores(before.folder, key, value), _scores(after.folder, key, value)
        common = sorted(a.keys() & b.keys())
        if common:
            made[column] = paired_compare([b[i] for i in common], [a[i] for i in common])
    return made


def markdown(rows: Sequence[Row]) -> str:
    """The card as Markdown: abilities, changes, grades, and what the columns mean."""
    parts = ["# Capability card", "", *_lines(*_headlines(rows))]
    if any(row.changes for row in rows):
        parts += ["", "## Change against the baseline", "", *_lines(*_changes(rows))]
    parts += ["", "## By difficulty", "", *_lines(*_grades(rows))]
    beside = _beside(rows)
    if beside[1]:
        parts += ["", "## Other benchmarks of the same runs", "", *_lines(*beside)]
    return "\n".join([*parts, "", *LEGEND, ""])


def page(rows: Sequence[Row], plot: str) -> str:
    """The same as one HTML page; `plot` is the picture as a data address."""
    image = f'<img src="{plot}" alt="dot plot of the card">'
    parts = ["<h1>Capability card</h1>", _html(*_headlines(rows)), image]
    if any(row.changes for row in rows):
        parts += ["<h2>Change against the baseline</h2>", _html(*_changes(rows))]
    parts += ["<h2>By difficulty</h2>", _html(*_grades(rows))]
    beside = _beside(rows)
    if beside[1]:
        parts += ["<h2>Other benchmarks of the same runs</h2>", _html(*beside)]
    parts += [f"<p>{html.escape(line)}</p>" for line in LEGEND]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Capability card'
        f"</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


LEGEND = (
    "Percent with the 95 % interval (by image); in brackets behind it chance and the blind score "
    "(the same model with the images permuted); the scorer stands last. n/a: the model has no way "
    "to do it.",
    "generation: F1 of the objects a caption names. reading: the word in the picture, one of 49. "
    "counting, comparison, relation: closed answers. retrieval: the true one of ten captions. "
    "hallucination: is the object there, yes or no.",
)
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;color:#1b1f24;margin:24px}table{border-collapse:"
    "collapse;margin:8px 0}td,th{border:1px solid #d8dee4;padding:4px 8px;text-align:left;"
    "white-space:nowrap}img{max-width:100%}p{max-width:70em}"
)
Table = tuple[list[str], list[list[str]]]


def _headlines(rows: Sequence[Row]) -> Table:
    head = ["model", *COLUMNS, "parameters", "weights", "openness"]
    body = []
    for row in rows:
        cells = [_cell(row.entry(key)) for key, _ in COLUMNS.values()]
        size = row.facts.get("parameters")
        facts = [f"{size / 1e6:,.1f} M" if size else "-", row.facts["licence"]]
        body.append([row.label, *cells, *facts, row.facts["openness"]])
    return head, body


def _grades(rows: Sequence[Row]) -> Table:
    head = ["model", "ability", "easy", "medium", "hard"]
    return head, [
        [row.label, ability, *(_cell(row.entry(f"{key}/{grade}")) for grade in head[2:])]
        for row in rows
        for ability, key in GRADED.items()
        if row.entry(f"{key}/easy")
    ]


def _changes(rows: Sequence[Row]) -> Table:
    head, body = ["model", "ability", "change, 95 % interval", "p", "n", "reading"], []
    for row in rows:
        for column, c in row.changes.items():
            sure = "forgotten" if c.high < 0 else "better" if c.low > 0 else "no difference"
            change = f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
            body.append([row.label, column, change, f"{c.p:.3f}", str(c.n), sure])
    return head, body


def _beside(rows: Sequence[Row]) -> Table:
    """Headlines of whatever else the same runs were scored on: real benchmarks among them."""
    names = dict.fromkeys(k for r in rows for k in r.metrics if not k.startswith("card_"))
    keys = [key for key in names if key.count("/") == 1]
    return ["model", *keys], [
        [row.label, *(_cell(row.entry(key)) for key in keys)]
        for row in rows
        if any(row.entry(key) for key in keys)
    ]


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "n/a"
    text = f"{100 * entry['value']:.1f}"
    if entry.get("low") is not None:
        text += f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    known = [f"{n} {100 * entry[n]:.1f}" for n in ("chance", "blind") if entry.get(n) is not None]
    text += f" ({', '.join(known)})" if known else ""
    return text + (f" {entry['scorer']}" if entry.get("scorer") else "")


def _lines(head: list[str], body: list[list[str]]) -> list[str]:
    rows = [[_plain(cell) for cell in row] for row in (head, *body)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _plain(cell: str) -> str:
    """A cell that cannot leave its table or become markup."""
    return html.escape(" ".join(str(cell).split()), quote=False).replace("|", "\\|")


def _html(head: list[str], body: list[list[str]]) -> str:
    rows = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for row in body:
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>")
    return "<table>" + "\n".join(rows) + "</table>"


def _scores(folder: Path, key: str, value: str) -> dict[str, float]:
    """The score of each sample behind a headline, by id; empty if no records are stored."""
    import pyarrow.parquet as pq

    path, (benchmark, _, kind) = folder / "samples.parquet", (*key.split("/"), "")[:3]
    if not path.is_file():
        return {}
    table = pq.read_table(path, filters=[("benchmark", "==", benchmark)])
    if value not in table.column_names:
        return {}
    columns = (table[name].to_pylist() for name in ("sample_id", "slice", value))
    return {i: float(v) for i, s, v in zip(*columns, strict=True) if not kind or s == kind}

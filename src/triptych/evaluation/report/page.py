"""The report as Markdown with its pictures beside it, and as one HTML page that needs no file."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triptych.evaluation.gallery import inlined, shrunk
from triptych.evaluation.metrics import wilson
from triptych.evaluation.report.gather import Asked, Failure, Found
from triptych.types import ImageRef

SIDE = 320  # the longer side of a picture in the report, in pixels
WORDS = 600  # characters of an answer


@dataclass
class Report:
    """All that the two layouts tell."""

    title: str
    facts: dict[str, str]
    prompts: Sequence[str]
    asked: Sequence[Asked]
    how: str
    found: Found
    notes: Sequence[str]


def write(report: Report, out: Path) -> list[Path]:
    """report.md with pictures/, and report.html."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    images = [a.ref for a in report.asked] + [
        ref for failure in report.found.cases for ref in pictures_of(failure)
    ]
    files: dict[str, str] = {}
    for ref in images:
        if ref.key not in files:
            data, kind = shrunk(ref, SIDE)
            ending = {"jpeg": "jpg"}.get(kind, kind)
            name = f"pictures/{len(files):02d}-{_safe(ref.name)}.{ending}"
            (out / name).write_bytes(data)
            files[ref.key] = name
    (out / "report.md").write_text(markdown(report, files), encoding="utf-8")
    (out / "report.html").write_text(page(report), encoding="utf-8")
    return [out / "report.md", out / "report.html"]


def pictures_of(failure: Failure) -> list[ImageRef]:
    sample = failure.case.sample
    return [] if sample is None else list(sample.images)


def markdown(report: Report, files: dict[str, str]) -> str:
    lines = [f"# {_md(report.title)}", ""]
    lines += [f"- {_md(name)}: {_md(value)}" for name, value in report.facts.items()]
    lines += ["", f"## {len(report.asked)} images, {len(report.prompts)} prompts each", ""]
    lines += [f"Answers are {_md(report.how)}.", ""]
    lines += ["| image | " + " | ".join(_md(p) for p in report.prompts) + " |"]
    lines += ["|---" * (1 + len(report.prompts)) + "|"]
    for asked in report.asked:
        cells = [_md(_cut(answer)) or "(empty)" for answer in asked.answers]
        lines.append(f"| ![]({files[asked.ref.key]}) {_md(asked.ref.name)} | {' | '.join(cells)} |")
    lines += ["", "## Failure cases", ""]
    for number, failure in enumerate(report.found.cases, 1):
        lines += [f"### {number}. {_md(failure.first)}", ""]
        lines += [f"![]({files[ref.key]})" for ref in pictures_of(failure)]
        lines += ["", *(f"- {name}: {_md(value)}" for name, value in _terms(failure)), ""]
    lines += ["## What the failures look like", "", "| hypothesis | failures | share, 95 % |"]
    lines += [
        "|---|---|---|",
        *(f"| {' | '.join(map(_md, row))} |" for row in _shares(report.found)),
    ]
    lines += ["", *(_md(note) for note in report.notes), ""]
    return "\n".join(lines)


def page(report: Report) -> str:
    facts = "".join(f"<dt>{_e(n)}</dt><dd>{_e(v)}</dd>" for n, v in report.facts.items())
    head = "".join(f"<th>{_e(p)}</th>" for p in report.prompts)
    rows = "".join(
        f"<tr><td>{inlined(a.ref, SIDE)}<br>{_e(a.ref.name)}</td>"
        + "".join(f"<td>{_e(_cut(answer)) or '(empty)'}</td>" for answer in a.answers)
        + "</tr>"
        for a in report.asked
    )
    cases = "".join(
        f"<section><h3>{number}. {_e(f.first)}</h3>"
        + "".join(inlined(ref, SIDE) for ref in pictures_of(f))
        + "<dl>"
        + "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in _terms(f))
        + "</dl></section>"
        for number, f in enumerate(report.found.cases, 1)
    )
    shares = "".join(
        "<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>"
        for row in _shares(report.found)
    )
    notes = "".join(f"<p>{_e(note)}</p>" for note in report.notes)
    title = _e(report.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><dl>{facts}</dl>"
        f"<h2>{len(report.asked)} images, {len(report.prompts)} prompts each</h2>"
        f"<p>Answers are {_e(report.how)}.</p>"
        f"<table><tr><th>image</th>{head}</tr>{rows}</table><h2>Failure cases</h2>"
        f'<div class="cases">{cases}</div><h2>What the failures look like</h2>'
        f"<table><tr><th>hypothesis</th><th>failures</th><th>share, 95 %</th></tr>{shares}</table>"
        f"{notes}</body></html>\n"
    )


def _terms(failure: Failure) -> list[tuple[str, str]]:
    record, case = failure.case.record, failure.case
    terms = [
        ("sample", f"{record['benchmark']}, {record['sample_id']}"),
        ("question", case.question or "(none)"),
        ("gold", str(record["gold"])),
        ("answer", _cut(str(record["raw_output"])) or "(empty)"),
    ]
    if not failure.hypotheses:
        return [*terms, ("hypothesis", "no rule applies to this record")]
    return terms + [("hypothesis", f"{n}: {why}") for n, why in failure.hypotheses.items()]


def _shares(found: Found) -> list[list[str]]:
    rows = []
    for name, count in found.counts.most_common():
        _, low, high = wilson(count, found.failures)
        share = f"{100 * count / found.failures:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
        rows.append([name, f"{count:,}", share])
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= WORDS else text[:WORDS] + "…"


def _e(text: object) -> str:
    return html.escape(str(text))


def _md(text: object) -> str:
    """One line that holds no markup, whoever wrote it."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", line)


def _safe(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", Path(name).stem)[:40].strip("-") or "picture"


_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;color:#1b1f24;margin:24px;max-width:1100px}"
    "table{border-collapse:collapse}td,th{border:1px solid #d8dee4;padding:6px 8px;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}img{max-width:160px;min-width:96px;"
    "image-rendering:auto}dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 10px}"
    "dt{color:#6b7280}dd{margin:0;overflow-wrap:anywhere}.cases{display:grid;gap:12px;"
    "grid-template-columns:repeat(auto-fill,minmax(320px,1fr))}section{border:1px solid #d8dee4;"
    "border-radius:6px;padding:10px}h3{margin:0 0 8px}"
)

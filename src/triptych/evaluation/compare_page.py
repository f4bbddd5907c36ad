"""compare.html: tables, a sweep's hyperparameters, and what one run wins and loses, in one file."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych.evaluation.compare_runs import EvaluatedRun, Row, split_key
from triptych.evaluation.compare_tables import difference_rows, headline, percent, score_rows
from triptych.evaluation.gallery import inlined
from triptych.types import ImageRef, TriptychError

if TYPE_CHECKING:
    from triptych.evaluation.compare import Difference

SHOWN = 12  # wins, and losses, of each headline difference
WIDTH, HEIGHT, TOP, SIDE = 1080, 430, 110, 70  # of the plot, in pixels
AXES = 12  # settings that fit side by side
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1b1f24;margin:24px;background:#fff}
table{border-collapse:collapse;margin:8px 0 20px}th{font-weight:600}
td,th{padding:4px 10px;border-bottom:1px solid #d8dee4;text-align:left}
.better{color:#1a7f37}.worse{color:#c62828}.grid{display:flex;flex-wrap:wrap;gap:12px}
figure{margin:0;padding:10px;width:200px;border:1px solid #d8dee4;border-radius:6px}
img{width:200px;height:200px;object-fit:contain;background:#f6f8fa}img.small{image-rendering:pixelated}
dl{margin:6px 0 0;display:grid;grid-template-columns:auto 1fr;gap:0 8px;overflow-wrap:anywhere}
dt{color:#6b7280}dd{margin:0}.id{color:#6b7280;font-size:11px;overflow-wrap:anywhere}
svg{overflow:visible}svg text{font:12px system-ui,sans-serif;fill:#1b1f24}svg .end{fill:#6b7280}
polyline{fill:none;stroke-width:2;opacity:.75}polyline:hover{stroke-width:5;opacity:1}
"""


def write_page(path: Path, runs: Sequence[EvaluatedRun], found: Sequence[Difference]) -> None:
    """Write the page. Pictures come from the runs' own data sets, if these are here."""
    pictures, missing = _pictures(runs, found)
    parts = ["<h1>Comparison</h1>", "<h2>Scores</h2>", _table(score_rows(runs))]
    heads = [d for d in found if headline(d.metric)]
    others = [d for d in found if not headline(d.metric)]
    if heads:
        parts += [
            "<h2>Differences, in points, 95 % interval by image</h2>",
            _table(difference_rows(heads)),
        ]
    plot = parallel_coordinates(runs)
    if plot:
        parts += ["<h2>Hyperparameters</h2>", plot]
    for row in heads:
        parts += _examples(row, runs, pictures)
    if others:
        parts += ["<h2>Slices and further scorers</h2>", _table(difference_rows(others))]
    parts += [f"<p>Without pictures: {html.escape(why)}</p>" for why in missing]
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = []
    for row in rows:
        look = f' class="{row["verdict"]}"' if row.get("verdict") in ("better", "worse") else ""
        cells = "".join(
            f"<td>{html.escape('-' if v is None else str(v))}</td>" for v in row.values()
        )
        lines.append(f"<tr{look}>{cells}</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def _chosen(names: Sequence[str]) -> list[str]:
    """A few of many, always the same."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(names))[:SHOWN]
    return [names[i] for i in sorted(order)]


def _examples(
    row: Difference, runs: Sequence[EvaluatedRun], pictures: Mapping[str, Sequence[ImageRef]]
) -> list[str]:
    a, b = (next(run for run in runs if run.name == name) for name in (row.a, row.b))
    left, right = a.samples(row.metric), b.samples(row.metric)
    parts = []
    for word, names in (("wins", row.wins), ("losses", row.losses)):
        some = _chosen(names)
        title = f"{row.metric}: {row.b} {word} against {row.a}, {len(some)} of {len(names):,}"
        parts.append(f"<h2>{html.escape(title)}</h2>")
        figures = []
        for name in some:
            images = "".join(inlined(ref) for ref in pictures.get(_place(row, name), ()))
            terms = {
                "question": left[name].get("question"),
                "gold": left[name].get("gold"),
                row.a: left[name].get("raw_output"),
                row.b: right[name].get("raw_output"),
            }
            words = "".join(
                f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v or '(empty)'))}</dd>"
                for k, v in terms.items()
            )
            note = f'<div class="id">{html.escape(name)}</div>'
            figures.append(f"<figure>{images}<dl>{words}</dl>{note}</figure>")
        parts.append('<div class="grid">' + "\n".join(figures) + "</div>")
    return parts


def _place(row: Difference, name: str) -> str:
    return f"{split_key(row.metric)[0]}\n{name}"


def _pictures(
    runs: Sequence[EvaluatedRun], found: Sequence[Difference]
) -> tuple[dict[str, Sequence[ImageRef]], list[str]]:
    """Images of the samples that are shown, and why there are none of a benchmark."""
    from omegaconf import OmegaConf

    from triptych.build import build

    wanted: dict[str, set[str]] = {}
    for row in (d for d in found if headline(d.metric)):
        names = {*_chosen(row.wins), *_chosen(row.losses)}
        wanted.setdefault(split_key(row.metric)[0], set()).update(names)
    nodes = {k: v for run in reversed(runs) for k, v in (run.nodes or {}).items()}
    images: dict[str, Sequence[ImageRef]] = {}
    missing = []
    for bench, names in wanted.items():
        try:
            samples = build(OmegaConf.create(nodes[bench])).samples
        except KeyError:
            missing.append(f"{bench}: the runs do not say where its data is.")
            continue
        except TriptychError as error:
            missing.append(f"{bench}: {error}")
            continue
        for i in range(len(samples)):
            if samples[i].id in names:
                images[f"{bench}\n{samples[i].id}"] = samples[i].images
    return images, missing


# --- parallel coordinates -----------------------------------------------------------------------


def parallel_coordinates(runs: Sequence[EvaluatedRun]) -> str:
    """An SVG with an axis for each setting that differs, and one for the first headline metric.

    One line a run, coloured from the worst (red) to the best (green) value; the first twelve
    settings. Empty if none differs or fewer than two runs have the metric.
    """
    key = next((k for k in (runs[0].metrics if runs else ()) if headline(k)), None)
    held = [run for run in runs if run.metrics.get(key, {}).get("value") is not None]
    axes = varying(held)[:AXES]
    if len(held) < 2 or not axes:
        return ""
    scores = [run.metrics[key]["value"] for run in held]
    columns = [_Axis(name, [run.settings.get(name) for run in held]) for name in axes]
    columns.append(_Axis(key, scores))
    step = (WIDTH - 2 * SIDE) / (len(columns) - 1)
    parts = []
    for number, axis in enumerate(columns):
        x = SIDE + number * step
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT}" stroke="#9aa4ae"/>')
        label = html.escape(axis.name)
        turn = f'x="{x:.1f}" y="{TOP - 14}" transform="rotate(-22 {x:.1f} {TOP - 14})"'
        parts.append(f"<text {turn}>{label}</text>")
        for text, share in axis.ticks():
            y = HEIGHT - share * (HEIGHT - TOP)
            parts.append(
                f'<text class="end" x="{x + 6:.1f}" y="{y + 4:.1f}">{html.escape(text)}</text>'
            )
    low, high = min(scores), max(scores)
    for number, run in enumerate(held):
        points = " ".join(
            f"{SIDE + i * step:.1f},{HEIGHT - axis.share(number) * (HEIGHT - TOP):.1f}"
            for i, axis in enumerate(columns)
        )
        hue = 130 * ((scores[number] - low) / (high - low) if high > low else 1)
        title = html.escape(f"{run.name}: {percent(scores[number])}")
        parts.append(
            f'<polyline points="{points}" stroke="hsl({hue:.0f} 60% 42%)"><title>{title}</title>'
            "</polyline>"
        )
    size = f'width="{WIDTH}" height="{HEIGHT + 30}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>' + "\n".join(parts) + "</svg>"


def varying(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Settings of which the runs have more than one value, the seed among them."""
    keys = list(dict.fromkeys(k for run in runs for k in ("seed", *run.recipe)))
    return [k for k in keys if len({repr(run.settings.get(k)) for run in runs}) > 1]


class _Axis:
    """Values of one setting along a line: numbers by size (by magnitude, if they span some)."""

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name, self.values = name, values
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values):
            span = min(numbers) > 0 and max(numbers) / min(numbers) >= 20
            scaled = [math.log10(v) if span else float(v) for v in numbers]
            low, high = min(scaled), max(scaled)
            self.shares = [(v - low) / (high - low) if high > low else 0.5 for v in scaled]
        else:
            words = sorted({str(v) for v in values})
            self.shares = [words.index(str(v)) / max(1, len(words) - 1) for v in values]

    def share(self, number: int) -> float:
        """Where a run's value stands, from 0 at the foot to 1 at the top."""
        return self.shares[number]

    def ticks(self) -> list[tuple[str, float]]:
        """Each value once, or the ends of many."""
        seen = dict(zip((_short(v) for v in self.values), self.shares, strict=True))
        ordered = sorted(seen.items(), key=lambda item: item[1])
        return ordered if len(ordered) <= 6 else [ordered[0], ordered[-1]]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:28]

"""check.html: findings in a data set, lengths, and samples with their tokens in colour."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych.data.inspection import Inspection, runs
from triptych.evaluation.gallery import inlined
from triptych.types import Sample

LISTED = 200  # findings of a kind on the page
BARS, WIDTH, HEIGHT = 40, 760, 140  # of the plots, in pixels
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1b1f24;margin:24px;max-width:1100px}
h2{margin-top:28px}.stops h3{color:#c62828}li{overflow-wrap:anywhere}
article{display:flex;gap:12px;border:1px solid #d8dee4;border-radius:6px;padding:10px;margin:8px 0}
article img{max-width:160px;max-height:160px;image-rendering:auto}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;flex:1}.id{color:#6b7280;font-size:12px}
.read{background:#f0f2f5}.image{background:#d7e7fb}.learned{background:#c9efd3}
.key span{padding:1px 6px;margin-right:8px}rect{fill:#4a7fc1}line{stroke:#c62828}
svg text{font:12px system-ui,sans-serif;fill:#6b7280}
"""


def write_page(path: Path, title: str, found: Inspection, tokenizer: Any) -> None:
    """Write the page; texts of the data are escaped, pictures are inside it."""
    parts = [
        f"<h1>{_e(title)}</h1>",
        f"<p>{found.samples:,} samples over {found.images:,} distinct images.</p>",
    ]
    parts += _findings(found)
    parts += [_histogram("tokens of a sample", found.lengths, found.limit)]
    parts += [_histogram("of them with loss", found.learned, 0)]
    if found.shown:
        parts += [
            "<h2>What is read and what is learned</h2>",
            '<p class="key"><span class="image">image</span><span class="read">read</span>'
            '<span class="learned">learned (carries loss)</span></p>',
            *(_sample(sample, encoded, tokenizer) for sample, encoded in found.shown),
        ]
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
        errors="replace",
    )


def _findings(found: Inspection) -> list[str]:
    if not found.findings:
        return ["<p>Nothing to complain about.</p>"]
    parts = []
    for kind, some in found.kinds().items():
        stops = some[0].stops
        items = "".join(f"<li>{_e(f.says)}</li>" for f in some[:LISTED])
        more = f"<p>and {len(some) - LISTED:,} more in check.json</p>" * (len(some) > LISTED)
        head = f"{_e(kind)}: {len(some):,}" + (", which stops a run" if stops else "")
        parts.append(
            f'<section class="{"stops" if stops else "look"}"><h3>{head}</h3><ul>{items}</ul>'
            f"{more}</section>"
        )
    return ["<h2>Findings</h2>", *parts]


def _histogram(title: str, counts: Sequence[int], limit: int) -> str:
    """Bars of equal width up to the longest; a red line where samples are cut."""
    if not counts:
        return ""
    most = max(counts)
    step = max(1, -(-(most + 1) // BARS))
    bars = [0] * (most // step + 1)
    for count in counts:
        bars[count // step] += 1
    wide, tall = WIDTH / len(bars), HEIGHT / max(bars)
    drawn = "".join(
        f'<rect x="{i * wide:.1f}" y="{HEIGHT - n * tall:.1f}" width="{max(1, wide - 1):.1f}" '
        f'height="{n * tall:.1f}"><title>{i * step} to {(i + 1) * step - 1}: {n:,}</title></rect>'
        for i, n in enumerate(bars)
    )
    if 0 < limit < len(bars) * step:
        at = limit / step * wide
        drawn += f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT}"/>'
    return (
        f'<h2>{_e(title)}</h2><svg width="{WIDTH}" height="{HEIGHT + 20}">{drawn}'
        f'<text x="0" y="{HEIGHT + 15}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{most:,}</text></svg>'
    )


def _sample(sample: Sample, encoded: Any, tokenizer: Any) -> str:
    pieces = []
    for kind, ids in runs(encoded):
        text = f"[{len(ids)} image tokens]" if kind == "image" else tokenizer.decode(ids)
        pieces.append(f'<span class="{kind}" title="{len(ids)} tokens">{_e(text)}</span>')
    pictures = "".join(inlined(ref, 160) for ref in sample.images[:4])
    return (
        f'<article><div>{pictures}<div class="id">{_e(sample.id)}</div></div>'
        f'<div class="tokens">{"".join(pieces)}</div></article>'
    )


def _e(text: object) -> str:
    return html.escape(str(text))

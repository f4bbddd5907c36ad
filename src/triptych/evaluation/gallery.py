"""Pictures of what a model answered: `gallery.html` for reading, `gallery.png` for a glance."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triptych.types import ImageRef

Record = Mapping[str, Any]
Pictures = Mapping[str, Sequence[ImageRef]]  # sample id -> its images

COLUMNS, CELL, PICTURE, MARGIN = 8, 168, 128, 16  # of the PNG, in pixels
RIGHT, WRONG, INK, GREY = "#1a7f37", "#c62828", "#1b1f24", "#6b7280"
# Files of fonts that hold more than Latin, by the names under which systems ship them.
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKkr-Regular.otf", "NotoSansKR-Regular.ttf")
FONTS += ("NanumGothic.ttf", "UnDotum.ttf", "AppleSDGothicNeo.ttc", "malgun.ttf")
FONTS += ("DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "DejaVuSans.ttf")


def write_gallery(
    out: Path, records: Sequence[Record], pictures: Pictures, seed: int = 0, size: int = 24
) -> None:
    """Write both galleries: `size` random records, and `size` random failures if there are any."""
    rng = np.random.Generator(np.random.PCG64(seed))
    failures = [record for record in records if not record["correct"]]
    some = [records[i] for i in sorted(rng.permutation(len(records))[:size])]
    wrong = [failures[i] for i in sorted(rng.permutation(len(failures))[:size])]
    sections = {
        f"{len(some)} of {len(records):,} at random": some,
        f"{len(wrong)} of {len(failures):,} failures": wrong,
    }
    (out / "gallery.html").write_text(_page(sections, pictures), encoding="utf-8")
    draw_gallery(sections, pictures).save(out / "gallery.png", optimize=True)


# --- HTML ---------------------------------------------------------------------------------------

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;color:#1b1f24;margin:24px;background:#fff}
.grid{display:flex;flex-wrap:wrap;gap:12px}
figure{margin:0;padding:10px;width:200px;border:1px solid #d8dee4;border-radius:6px}
figure.wrong{border-color:#c62828}
img{display:block;width:200px;height:200px;object-fit:contain;background:#f6f8fa}
img.small{image-rendering:pixelated}
dl{margin:6px 0 0;display:grid;grid-template-columns:auto 1fr;gap:0 8px;overflow-wrap:anywhere}
dt{color:#6b7280}dd{margin:0}.right dd.answer{color:#1a7f37}.wrong dd.answer{color:#c62828}
.id{color:#6b7280;font-size:11px;overflow-wrap:anywhere}
"""


def _page(sections: Mapping[str, Sequence[Record]], pictures: Pictures) -> str:
    body = []
    for title, records in sections.items():
        figures = "\n".join(_figure(record, pictures) for record in records)
        body.append(f'<h2>{html.escape(title)}</h2>\n<div class="grid">\n{figures}\n</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Gallery</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _figure(record: Record, pictures: Pictures) -> str:
    images = "".join(inlined(ref) for ref in pictures.get(record["sample_id"], ()))
    rows = {"question": record["question"], "gold": record["gold"], "answer": _answer(record)}
    beside = ("before", "prior", "blind")
    rows |= {name: record[name] for name in beside if record.get(name) is not None}
    terms = "".join(
        f'<dt>{name}</dt><dd class="{name}">{html.escape(str(text))}</dd>'
        for name, text in rows.items()
    )
    name = html.escape(f"{record['benchmark']} · {record['sample_id']}")
    judged = "right" if record["correct"] else "wrong"
    return f'<figure class="{judged}">{images}<dl>{terms}</dl><div class="id">{name}</div></figure>'


def shrunk(ref: ImageRef, side: int) -> tuple[bytes, str]:
    """A picture of at most `side` pixels a side, and its kind: "png" where small, else "jpeg"."""
    picture = ref.open()
    small = max(picture.size) <= 200
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    return buffer.getvalue(), "png" if small else "jpeg"


def inlined(ref: ImageRef, side: int = 400) -> str:
    """The picture as an element that needs no file; pixels of small ones may stay crisp."""
    data, kind = shrunk(ref, side)
    look, text = ' class="small"' if kind == "png" else "", base64.b64encode(data).decode("ascii")
    return f'<img{look} alt="{html.escape(ref.name)}" src="data:image/{kind};base64,{text}">'


def _answer(record: Record) -> str:
    return record["raw_output"].strip() or "(empty)"


# --- PNG ----------------------------------------------------------------------------------------


def draw_gallery(sections: Mapping[str, Sequence[Record]], pictures: Pictures) -> Image.Image:
    """The sections as grids of picture, question, gold and answer, on one sheet."""
    line, height = 15, PICTURE + 7 * 15 + 14
    tops, y = [], MARGIN
    for records in sections.values():
        tops.append(y)
        y += 32 + max(1, -(-len(records) // COLUMNS)) * height
    sheet = Image.new("RGB", (2 * MARGIN + COLUMNS * CELL, y + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (title, records) in zip(tops, sections.items(), strict=True):
        draw.text((MARGIN, top), title, INK, _font(title, 18))
        for number, record in enumerate(records):
            row, column = divmod(number, COLUMNS)
            x, y = MARGIN + column * CELL, top + 32 + row * height
            _draw_pictures(sheet, x, y, pictures.get(record["sample_id"], ()))
            y += PICTURE + 4
            for text, color in _lines(record, draw):
                draw.text((x, y), text, color, _font(text, 12))
                y += line
    return sheet


def _draw_pictures(sheet: Image.Image, x: int, y: int, refs: Sequence[ImageRef]) -> None:
    """Up to four pictures of a sample, side by side in one square."""
    across = 1 if len(refs) < 2 else 2
    side = PICTURE // across
    for number, ref in enumerate(refs[:4]):
        picture = ref.open()
        scale = side / max(picture.size)
        size = tuple(max(1, round(scale * length)) for length in picture.size)
        whole = scale >= 2 and scale == int(scale)  # pixels of tiny pictures stay crisp
        picture = picture.resize(size, Image.Resampling.NEAREST if whole else None)
        sheet.paste(picture, (x + number % across * side, y + number // across * side))


def _lines(record: Record, draw: ImageDraw.ImageDraw) -> list[tuple[str, str]]:
    """At most seven lines: three of the question, one of the gold answer, two of the model's, and
    one of what it answered before training."""
    color = RIGHT if record["correct"] else WRONG
    before = record.get("before")
    early = [] if before is None else _wrap(f"before: {before.strip() or '(empty)'}", draw, 1)
    return [
        *((text, INK) for text in _wrap(record["question"], draw, 3)),
        *((text, GREY) for text in _wrap(f"gold: {record['gold']}", draw, 1)),
        *((text, GREY) for text in early),
        *((text, color) for text in _wrap(f"answer: {_answer(record)}", draw, 2)),
    ]


def _wrap(text: str, draw: ImageDraw.ImageDraw, most: int) -> list[str]:
    """Break a text at blanks, or anywhere in long words, to lines of a cell's width."""
    text = " ".join(text.split())[:400]
    font, lines = _font(text, 12), [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if draw.textlength(joined, font) <= CELL - 12:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if draw.textlength(lines[-1] + letter, font) > CELL - 12:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"]


_FOUND: dict[tuple[str, int], Any] = {}


def _font(text: str, size: int) -> Any:
    """Pillow's own font for Latin text; for other scripts the first wide font of the system."""
    name = "" if text.isascii() else "wide"
    if (name, size) not in _FOUND:
        _FOUND[name, size] = ImageFont.load_default(size) if not name else _wide_font(size)
    return _FOUND[name, size]


def _wide_font(size: int) -> Any:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)  # searches the system's font folders
        except OSError:
            continue
    return ImageFont.load_default(size)

"""The card as a dot plot: a panel an ability, a line a model, chance and blind as ticks."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from triptych.evaluation.card.table import COLUMNS, Row


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG: dots with their intervals; a ring is the blind score, the dashed line is chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * len(COLUMNS) + 1.6, 0.34 * len(rows) + 1.5), dpi=120)
    panels = figure.subplots(1, len(COLUMNS), sharey=True, squeeze=False)[0]
    for panel, (column, (key, _)) in zip(panels, COLUMNS.items(), strict=True):
        for y, row in enumerate(rows):
            entry = row.entry(key)
            if entry is None:
                panel.text(50, y, "n/a", ha="center", va="center", color="#6b7280", fontsize=8)
                continue
            color = "#6b7280" if row.baseline else "#0969da"
            low, high = entry.get("low"), entry.get("high")
            if low is not None and high is not None:
                panel.plot([100 * low, 100 * high], [y, y], color=color, lw=1.5)
            panel.plot(100 * entry["value"], y, "o", color=color, ms=6)
            if entry.get("blind") is not None:
                panel.plot(100 * entry["blind"], y, "o", mfc="none", color="#c62828", ms=6)
            if entry.get("chance") is not None:
                chance = 100 * entry["chance"]
                panel.plot([chance, chance], [y - 0.4, y + 0.4], "--", color="#6b7280", lw=1)
        panel.set_title(column, fontsize=9)
        panel.set_xlim(-3, 103)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="x", color="#eaeef2")
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
    names = [row.label if len(row.label) <= 32 else row.label[:31] + "…" for row in rows]
    panels[0].set_yticks(range(len(rows)), [n.replace("$", r"\$") for n in names])
    figure.supxlabel("percent; dashed: chance, ring: blind", fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_address(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

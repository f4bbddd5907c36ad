"""Write cards: one after every evaluation on the card, and one over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from triptych.adapt import numel
from triptych.bundle import find_bundle
from triptych.evaluation.benchmark import Metrics
from triptych.evaluation.card.facts import model_facts
from triptych.evaluation.card.plot import as_address, draw
from triptych.evaluation.card.table import (
    CARD_FILE,
    COLUMNS,
    Row,
    compare_rows,
    markdown,
    page,
    read_row,
)
from triptych.evaluation.records import write_json
from triptych.types import TriptychError


def write_card(rows: Sequence[Row], out: Path) -> list[Path]:
    """card.md, card.html and card.png."""
    out.mkdir(parents=True, exist_ok=True)
    png = draw(rows)
    files = {
        "card.md": markdown(rows).encode(),
        "card.html": page(rows, as_address(png)).encode(),
        "card.png": png,
    }
    for name, content in files.items():
        (out / name).write_bytes(content)
    return [out / name for name in files]


def after_evaluation(cfg: DictConfig, predictor: Any, folder: Path, metrics: Metrics) -> None:
    """Leave the model's facts, and its own card, beside results that hold the card's columns.

    cfg: of the training or of the evaluation. Where the same run was scored before training, the
    card shows both and what changed.
    """
    if not any(key in metrics for key, _ in COLUMNS.values()):
        return
    described, label = cfg, folder.parent.name if folder.name == "before" else folder.name
    if cfg.get("run") is not None:
        described, label = OmegaConf.load(find_bundle(cfg.run) / "config.yaml"), Path(cfg.run).name
    elif "run" in cfg:  # a preset or a remote model
        label = " ".join(str(v) for v in (cfg.model.name, cfg.model.get("id")) if v)
    model = getattr(predictor, "model", None)
    count = None if model is None else sum(map(numel, model.parameters()))
    write_json(folder / CARD_FILE, model_facts(described, label, count))
    files = write_card(rows_of([folder]), folder)
    print(f"Capability card: {', '.join(map(str, files))}", flush=True)


def rows_of(folders: Sequence[Path], before: Path | None = None) -> list[Row]:
    """A row an evaluation; each is compared with `before`, or with its own `before/`."""
    rows: list[Row] = []
    shared = None
    if before is not None:
        shared = read_row(scored(before), baseline=True)
        rows.append(shared)
    for folder in folders:
        row, base = read_row(scored(folder)), shared
        own = row.folder / "before"
        if row.folder.parent.name == "eval":  # what evaluate.py run=DIR leaves
            own = row.folder.parents[1] / "before"
        if base is None and (own / CARD_FILE).is_file():
            base = read_row(own, baseline=True)
            base.facts["label"] = f"{row.label} (before)"
            rows.append(base)
        if base is not None:
            row.changes = compare_rows(base, row)
        rows.append(row)
    return rows


def scored(folder: Path) -> Path:
    """Where a run's card was measured: in itself, or in its newest evaluation."""
    if not folder.is_dir():
        raise TriptychError(f"'{folder}' is no folder; name run or evaluation directories.")
    if (folder / CARD_FILE).is_file():
        return folder
    later = sorted(folder.glob(f"eval/*/{CARD_FILE}"), key=lambda path: path.stat().st_mtime)
    return later[-1].parent if later else folder

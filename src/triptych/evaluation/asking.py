"""Asking a model: batch by batch, kept as it goes, shared by all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.distributed import rank, wait, world
from triptych.evaluation.identity import digest
from triptych.evaluation.planning import plan, row_tokens
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.store import Answers
from triptych.types import ImageRef, Sample

Counters = dict[str, float]


def ask(
    scorer: Scorer,
    predictor: Predictor,
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    store: Answers | None,
    label: str,
    progress: bool,
) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes in the order of the samples, and what they cost.

    With a store, answers that are there are not asked for again, and the ranks take turns at the
    batches that are missing. Without one, every process asks everything for itself.
    """
    from tqdm import tqdm

    kept = {} if store is None else store.open()
    ids = [sample.id for sample in samples]
    missing = [(n, rows) for n, rows in enumerate(batches) if any(ids[r] not in kept for r in rows)]
    whole = getattr(scorer, "whole", False)
    mine = missing if store is None or whole else missing[rank() :: world()]
    if progress and rank() == 0 and store is not None and store.changed:
        print(f"{label}: asked anew, since other: {', '.join(store.changed)}", flush=True)
    if progress and rank() == 0 and kept:
        print(f"{label}: {len(kept):,} of {len(ids):,} answers are there already", flush=True)
    if store is not None and whole:
        predictor = SharedEmbeddings(predictor, store.scratch)
    outcomes: dict[str, Outcome] = dict(kept)
    times: list[dict[str, Any]] = []
    with tqdm(
        total=len(ids), initial=len(kept), desc=label, unit="q", disable=not progress or rank() > 0
    ) as bar:
        for number, rows in mine:
            before, start = _counters(predictor), time.perf_counter()
            answers = scorer.ask(predictor, [samples[row] for row in rows])
            cost = {k: v - before.get(k, 0) for k, v in _counters(predictor).items()}
            cost |= {"batch": number, "seconds": round(time.perf_counter() - start, 6)}
            cost["questions"] = len(rows) if not whole or rank() == 0 else 0
            times.append(cost)
            if store is not None:
                if not whole or rank() == 0:
                    store.append(rows, answers)
                store.note(**cost)
            outcomes |= {ids[row]: outcome for row, outcome in zip(rows, answers, strict=True)}
            bar.update(len(rows))
    if store is None:
        return [outcomes[key] for key in ids], summary(times, samples)
    if kept and missing and rank() == 0:
        store.note(resumed=1)
    return store.finish(), summary(store.times(), samples)


def batches_of(scorer: Scorer, predictor: Predictor, samples: Sequence[Sample]) -> list[list[int]]:
    """Rows that run together; scorers that compare all samples with each other take one batch."""
    if getattr(scorer, "whole", False):
        return [list(range(len(samples)))]
    ranked = scorer.needs in ("loglikelihood", "sentences")  # all candidates stand in a row
    image = getattr(predictor, "image_tokens", 0)
    tokens = [row_tokens(s, image, s.candidates if ranked else ()) for s in samples]
    return list(plan(samples, predictor.batch_size, tokens))


def summary(times: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> dict[str, Any]:
    """Totals over batches. `seconds` are those of the busiest rank, all its resumed parts added."""
    ranks: dict[int, float] = {}
    total: Counters = {}
    for row in times:
        ranks[row.get("rank", 0)] = ranks.get(row.get("rank", 0), 0.0) + row.get("seconds", 0.0)
        for key, value in row.items():
            if key not in ("rank", "batch", "seconds"):
                total[key] = total.get(key, 0) + value
    seconds = max(ranks.values(), default=0.0)
    made = {"vision_calls": 0, "generated_tokens": 0, "resumed": 0, **total}
    return made | {
        "seconds": round(seconds, 3),
        "questions_per_second": round(total.get("questions", 0) / max(seconds, 1e-9), 2),
        "distinct_images": len({image.key for s in samples for image in s.images}),
        "ranks": len(ranks),
    }


def _counters(predictor: Any) -> Counters:
    counted = {name: getattr(predictor, name) for name in ("vision_calls", "generated_tokens")}
    return counted | dict(getattr(predictor, "costs", {}))


class SharedEmbeddings:
    """A predictor whose vectors are computed in fixed blocks, each by one rank, and kept on disk.

    What it does not share it hands through, so every rank computes that for itself.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        self._predictor, self._folder = predictor, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def embed_images(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,K,E) as the predictor's."""
        return self._blocks("images", refs, [r.key for r in refs], self._predictor.embed_images)

    def features(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,D) as the predictor's."""
        return self._blocks("features", refs, [r.key for r in refs], self._predictor.features)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N,E) as the predictor's, in blocks of texts of like length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = [texts[i] for i in order]
        vectors = self._blocks("texts", rows, rows, self._predictor.embed_texts)
        return vectors[torch.tensor(order).argsort()]

    def _blocks(
        self, kind: str, items: Sequence, keys: Sequence[str], embed: Callable[[Sequence], Tensor]
    ) -> Tensor:
        from safetensors.torch import load_file, save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        size, paths = self._predictor.batch_size, []
        for number, at in enumerate(range(0, len(items), size)):
            path = self._folder / f"{kind}-{digest(list(keys[at : at + size]))}.safetensors"
            paths.append(path)
            if number % world() == rank() and not path.exists():
                beside = path.with_suffix(f".rank{rank()}")
                save_file({"vectors": embed(items[at : at + size]).contiguous()}, beside)
                beside.replace(path)
        wait()
        return torch.cat([load_file(path)["vectors"] for path in paths])

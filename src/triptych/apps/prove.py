"""Prove on your own model and data what a run relies on: `python -m triptych.apps.prove model=llava
peft=qlora data=instructions data.path=mine.jsonl`.

Takes the options of train.py, its weights, and the first samples of its data; prints for each claim
the largest difference found. Claims: samples that share a row count as each alone; two
micro-batches make the step of one batch; cached features give the gradients of computed ones;
towers in chunks give those of one batch; answers and vectors do not depend on what stands beside
them. Beside them: rows=4 (rows of the data), device=cpu. Exit code 1 if a claim does not hold.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.options import beside_training, run_tool, whole_number
from triptych.types import TriptychError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triptych.build import Adapted
    from triptych.data.datamodule import DataModule
    from triptych.types import Batch, Sample

OWN = ("rows", "device")
EACH = 4  # samples taken of a row
LOW, FULL = 5e-2, 1e-4  # largest relative difference in half precision, and in float32
SMALLEST = 1e-3  # share of the largest gradient below which one is no scale of its own
LONGEST = 16  # tokens of an answer


@dataclass(frozen=True)
class Proof:
    """A claim with the largest relative difference found, or why it says nothing here."""

    claim: str
    difference: float | None = None
    allowed: float = 0.0
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.allowed

    def __str__(self) -> str:
        if self.difference is None:
            return f"-      {self.claim}: {self.note}"
        mark = "holds" if self.holds else "FAILS"
        found = f"{self.difference:.1e} of {self.allowed:.0e} allowed"
        return f"{mark}  {self.claim}: {found}{self.note and f', {self.note}'}"


@dataclass
class Step:
    """Loss and gradients of one optimizer step."""

    loss: float
    gradients: dict[str, Tensor]

    def difference(self, other: Step) -> tuple[float, str]:
        """The largest relative one over the loss and every trained tensor, and where it is."""
        found = {"the loss": abs(self.loss - other.loss) / max(abs(self.loss), 1e-12)}
        for name in self.gradients.keys() ^ other.gradients.keys():
            found[f"{name}, which has a gradient once only"] = float("inf")
        scale = max((float(g.norm()) for g in self.gradients.values()), default=0.0)
        for name in self.gradients.keys() & other.gradients.keys():
            mine = self.gradients[name]
            # the bias of keys has no gradient but rounding: small ones are measured by the largest
            size = max(float(mine.norm()), SMALLEST * scale, 1e-30)
            found[name] = float((mine - other.gradients[name]).norm()) / size
        where = max(found, key=found.__getitem__)
        return found[where], where


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every claim holds, 1 if not, 2 with one sentence if the options are wrong."""
    return run_tool(_run, __doc__, argv)


def _run(words: Sequence[str]) -> int:
    failed = 0
    for proof in prove(words):
        print(proof, flush=True)
        failed += not proof.holds
    return int(failed > 0)


def prove(words: Sequence[str]) -> Iterator[Proof]:
    """Build the model of these options with its weights, and yield the proofs one by one."""
    import torch

    from triptych.build import build_data, build_model, build_objective
    from triptych.bundle import compose_preset
    from triptych.hardware import quiet_libraries

    own, name, overrides = beside_training(words, OWN)
    count = whole_number(own, "rows", 4, least=2)
    device = own.get("device", "cpu")
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise TriptychError(f"device={device} is not there: {str(error).splitlines()[0]}") from None
    quiet_libraries()
    torch.manual_seed(0)
    cfg = compose_preset(name, overrides)
    adapted = build_model(cfg)
    model = adapted.model.to(device).eval()  # no dropout: it is drawn anew
    objective = build_objective(cfg, 1)
    data = build_data(cfg, model.processor(), objective)
    if not hasattr(data, "reader"):
        raise TriptychError("a stream has no first samples to compare; use another data=.")
    wake(model)
    rows = [row[:EACH] for row in data.first_rows(count)]
    yield from proofs(adapted, data, objective, rows)


def proofs(
    adapted: Adapted, data: DataModule, objective: Any, rows: list[list[Sample]]
) -> Iterator[Proof]:
    """Every claim about this model, on these rows."""
    model, processor = adapted.model, data.processor
    precise = all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())
    allowed = FULL if precise else LOW

    def step(batches: list[Batch]) -> Step:
        return _step(model, objective, batches)

    if getattr(model, "momentum", None) is not None:
        yield Proof("training steps", note="a momentum teacher changes with each; not compared")
    elif objective.in_batch:
        yield _chunks(objective, step, processor.rows(rows), allowed)
    else:
        whole = step([processor.rows(rows)])
        yield _packed(processor, step, whole, rows, allowed)
        halves = [processor.rows(rows[: len(rows) // 2]), processor.rows(rows[len(rows) // 2 :])]
        claim = "two micro-batches make the step of one batch"
        yield _compared(claim, whole, step(halves), allowed)
        yield _cached(adapted, processor, step, whole, rows, allowed)
    yield from _answers(model, processor, [sample for row in rows for sample in row], allowed)


def wake(model: torch.nn.Module) -> None:
    """Small numbers where a trained tensor starts at zero: behind it no gradient would be seen."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)


def _step(model: Any, objective: Any, batches: list[Batch]) -> Step:
    """By the trainer's own rule: every term by its count over all of the step's batches."""
    from triptych.data.datamodule import stamped
    from triptych.objectives.base import shares

    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in stamped(batches, objective):
        terms = objective(model, batch.to(device))
        part = sum(shares(terms, batch.totals).values())
        part.backward()
        loss += part.item()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss, gradients)


def _compared(claim: str, one: Step, other: Step, allowed: float) -> Proof:
    difference, where = one.difference(other)
    return Proof(claim, difference, allowed, f"most at {where}" if difference else "")


def _packed(
    processor: Any, step: Any, whole: Step, rows: list[list[Sample]], allowed: float
) -> Proof:
    claim = "samples that share a row count as each alone"
    if not getattr(processor, "packs", True) or max(map(len, rows)) < 2:
        return Proof(claim, note="this model or these data give each sample a row of its own")
    alone = step([processor.rows([[sample]]) for row in rows for sample in row])
    return _compared(claim, whole, alone, allowed)


def _chunks(objective: Any, step: Any, batch: Batch, allowed: float) -> Proof:
    from triptych.objectives.contrastive import Contrastive

    claim = "towers in chunks give the step of one batch"
    if not isinstance(objective, Contrastive):
        return Proof(claim, note="this objective compares the samples of a batch, in one piece")
    was, found = objective.chunk, []
    for chunk in (0, max(1, len(batch.samples) // 3)):
        objective.chunk = chunk
        found.append(step([batch]))
    objective.chunk = was
    return _compared(claim, *found, allowed)


def _cached(
    adapted: Adapted,
    processor: Any,
    step: Any,
    whole: Step,
    rows: list[list[Sample]],
    allowed: float,
) -> Proof:
    from triptych.data.cache import FeatureCache

    claim, vision = "cached features give the gradients of computed ones", adapted.model.vision
    known = hasattr(getattr(processor, "images", None), "cached") and not hasattr(vision, "loader")
    if not known or any(p.requires_grad for p in vision.parameters()):
        return Proof(claim, note="the vision encoder trains, or reads in its own way: no cache")
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), vision, adapted.bases["vision"])
        cache.fill([r for row in rows for s in row for r in s.images], 8, progress=False)
        processor.images.cached = cache
        try:
            return _compared(claim, whole, step([processor.rows(rows)]), allowed)
        finally:
            processor.images.cached = None


def _answers(model: Any, processor: Any, samples: list[Sample], allowed: float) -> Iterator[Proof]:
    """What comes out alone, and among others in reverse order."""
    from triptych.evaluation.model_predictor import ModelPredictor

    alone, among = (ModelPredictor(model, processor, size) for size in (1, len(samples)))
    offers = alone.capabilities
    if "generate" in offers:
        one = alone.generate(samples, max_new_tokens=LONGEST)
        other = among.generate(samples[::-1], max_new_tokens=LONGEST)[::-1]
        differ = sum(a != b for a, b in zip(one, other, strict=True))
        note = f"{differ} of {len(samples)} differ"
        yield Proof("answers alone are those in a batch", differ / len(samples), 0.0, note)
    if "embed" in offers:
        refs = [ref for sample in samples for ref in sample.images]
        texts = [sample.text for sample in samples]
        for what, ask, asked in (
            ("images", "embed_images", refs),
            ("texts", "embed_texts", texts),
        ):
            one = getattr(alone, ask)(asked)
            other = getattr(among, ask)(asked[::-1]).flip(0)
            far = float((one - other).abs().max())
            yield Proof(f"vectors of {what} alone are those in a batch", far, allowed)


if __name__ == "__main__":
    sys.exit(main())

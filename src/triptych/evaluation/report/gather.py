"""What the report tells: answers to a folder of pictures, and the failures of stored records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.evaluation.report.rules import UNEXPLAINED, Case, Lean, explain
from triptych.types import DataError, ImageRef, Sample, TriptychError, user

if TYPE_CHECKING:
    from triptych.api import Loaded

PROMPTS = ("describe the image.", "what is in the image?", "how many objects are there?")
SLICE = 300  # questions asked now where no records are stored


@dataclass
class Asked:
    """One picture and what was said to each prompt."""

    ref: ImageRef
    answers: list[str]


@dataclass
class Failure:
    """A wrong answer with its hypotheses, most specific first."""

    case: Case
    hypotheses: dict[str, str]

    @property
    def first(self) -> str:
        return next(iter(self.hypotheses), UNEXPLAINED)


@dataclass
class Found:
    """All failures counted by their first hypothesis, and the chosen cases."""

    records: int = 0
    failures: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    cases: list[Failure] = field(default_factory=list)


def ask_folder(
    loaded: Loaded, folder: Path, prompts: Sequence[str], images: int, max_new_tokens: int
) -> tuple[list[Asked], str]:
    """The first `images` readable pictures of a folder with an answer a prompt, and how it was had.

    A model that writes answers; one that writes captions only says the same to each prompt; one
    that only embeds ranks the pictures for each prompt by their cosine.
    """
    from triptych.apps.ask import images_of
    from triptych.evaluation.model_predictor import ModelPredictor

    refs = []
    for path in images_of(str(folder)):
        try:
            refs.append(ImageRef.from_picture(ImageRef.from_file(path).open(), path.name))
        except (DataError, OSError) as error:
            print(f"skipped {path}: {error}")
        if len(refs) == images:
            break
    if not refs:
        raise DataError(f"the folder '{folder}' holds no readable image; give another.")
    model = ModelPredictor(loaded.model, loaded.processor, batch_size=8)
    offers = model.capabilities
    if "generate" in offers or "caption" in offers:
        shown = prompts if "generate" in offers else [""] * len(prompts)
        samples = [
            Sample([user(prompt, images=1)], [ref], id=f"{ref.name} {n}")
            for ref in refs
            for n, prompt in enumerate(shown)
        ]
        said = model.generate(samples, max_new_tokens=max_new_tokens)
        size = len(prompts)
        how = "written" if "generate" in offers else "captions; the model reads no prompt"
        return [Asked(r, said[i * size : i * size + size]) for i, r in enumerate(refs)], how
    from triptych.evaluation.similarity import cosines

    scores = cosines(model.embed_images(refs), model.embed_texts(list(prompts)))  # (U,C)
    ranks = (scores[None] > scores[:, None]).sum(1) + 1  # (U,C)
    answers = [
        Asked(
            ref, [f"cosine {c:.3f}, number {k} of {len(refs)}" for c, k in zip(*two, strict=True)]
        )
        for ref, two in zip(refs, zip(scores, ranks, strict=True), strict=True)
    ]
    return answers, "cosines: the model writes nothing, so each prompt ranks the pictures"


def stored_records(run: Path) -> Path | None:
    """The newest folder of the run that holds records of an evaluation."""
    found = [
        p for p in (run / "samples.parquet", *run.glob("eval/*/samples.parquet")) if p.exists()
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def evaluate_now(loaded: Loaded, run: Path, out: Path) -> Path:
    """Score a slice of the run's own benchmarks, for a run that was never evaluated."""
    from triptych.evaluation.command import build_benchmarks
    from triptych.evaluation.model_predictor import ModelPredictor
    from triptych.evaluation.runner import evaluate

    benchmarks, _ = build_benchmarks(loaded.cfg.get("benchmark"))
    if not benchmarks:
        raise TriptychError(
            f"the run '{run}' holds no records and has no benchmark of its own; first run "
            f"evaluate.py run={run} benchmark=[card]."
        )
    predictor = ModelPredictor(loaded.model, loaded.processor, batch_size=32)
    evaluate(predictor, benchmarks, out / "evaluation", limit=SLICE)
    return out / "evaluation"


def find_failures(folder: Path, run: Path, count: int, seed: int = 0) -> Found:
    """Explain every failure of stored records, and choose `count` with as many hypotheses as
    there are, seeded.
    """
    import random

    import pyarrow.parquet as pq

    records = pq.read_table(folder / "samples.parquet").to_pylist()
    leans = {
        name: Lean.of([r for r in records if r["benchmark"] == name])
        for name in {r["benchmark"] for r in records}
    }
    wrong = [record for record in records if not record["correct"]]
    samples, readers = _samples(folder, run, {r["sample_id"] for r in wrong})
    failures = []
    for record in wrong:
        sample = samples.get(record["sample_id"])
        case = Case(record, sample, areas_of(sample, readers.get(record["benchmark"])))
        failures.append(Failure(case, explain(case, leans[record["benchmark"]])))
    counts = Counter(failure.first for failure in failures)
    random.Random(seed).shuffle(failures)
    failures.sort(key=lambda f: f.case.sample is None or not f.case.sample.images)  # stable
    queues: dict[str, list[Failure]] = {}
    for failure in failures:
        queues.setdefault(failure.first, []).append(failure)
    order = sorted(queues, key=lambda name: (name == UNEXPLAINED, -counts[name], name))
    chosen: list[Failure] = []
    while len(chosen) < min(count, len(failures)):
        chosen += [queues[name].pop(0) for name in order if queues[name]][: count - len(chosen)]
    return Found(len(records), len(failures), counts, chosen)


def areas_of(sample: Sample | None, reader: Any) -> dict[str, float]:
    """Share of the picture of each object, where the data know it."""
    if sample is None:
        return {}
    if "areas" in sample.meta:
        return dict(sample.meta["areas"])
    if sample.source == "shapes" and getattr(reader, "kind", "") == "questions":
        scene = reader.scene(int(sample.cluster.rsplit("/", 1)[1]))
        return {o.tag: 4 * o.radii[0] * o.radii[1] for o in scene.objects}
    return {}


def _samples(folder: Path, run: Path, wanted: set[str]) -> tuple[dict[str, Sample], dict[str, Any]]:
    """The samples behind records, from the benchmarks as they were configured then."""
    from omegaconf import OmegaConf

    from triptych.evaluation.command import SETTINGS, build_benchmarks

    for path in (folder / SETTINGS, run / "config.yaml", run / "bundle" / "config.yaml"):
        nodes = OmegaConf.load(path).get("benchmark") if path.is_file() else None
        if nodes:
            break
    else:
        return {}, {}
    try:
        benchmarks, _ = build_benchmarks(nodes)
    except TriptychError as error:
        print(f"pictures of failures are left out: {error}")
        return {}, {}
    found = {}
    for benchmark in benchmarks.values():
        rows = (benchmark.samples[i] for i in range(len(benchmark.samples)))
        found |= {sample.id: sample for sample in rows if sample.id in wanted}
    return found, {name: benchmark.samples for name, benchmark in benchmarks.items()}

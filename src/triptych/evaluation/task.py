"""What is asked of a benchmark: which samples, in which order, and which of them blind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from triptych.evaluation.baselines import permute_images
from triptych.evaluation.benchmark import Benchmark
from triptych.evaluation.planning import clusters_of, image_subset
from triptych.types import DataError, Sample, TriptychError

BLIND_SIZE = 1000  # questions of the blind run unless blind="all"
BLIND_RULE = 0  # the seed by which a benchmark without a committed subset draws one


@dataclass(frozen=True)
class Settings:
    """What is asked of each benchmark, apart from the model.

    limit: at most so many questions, all those of seeded images. blind: run again with permuted
    images on a fixed "subset" of 1,000 questions, on "all", or "none". images: "own", or "permuted"
    to ask every question about another image. scorer: null takes the first that the model can do,
    "all" each of them, a name that one. seed draws the limited images, the permutation and the
    gallery; it is not the training seed.
    """

    limit: int | None = None
    blind: str = "subset"
    images: str = "own"
    scorer: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blind not in ("subset", "all", "none"):
            raise TriptychError(f"eval.blind='{self.blind}' is unknown; use subset, all or none.")
        if self.images not in ("own", "permuted"):
            raise TriptychError(f"eval.images='{self.images}' is unknown; use own or permuted.")
        if self.limit is not None and self.limit < 1:
            raise TriptychError(
                f"eval.limit={self.limit} leaves no question; use 1 or more, or null."
            )


class Task:
    """A benchmark's samples as these settings select them."""

    def __init__(self, name: str, benchmark: Benchmark, settings: Settings) -> None:
        self.name, self.benchmark, self.settings = name, benchmark, settings
        self.samples = _select(name, benchmark, settings.limit, settings.seed)
        if settings.images == "permuted":
            self.samples = permute_images(self.samples, settings.seed)
            if not self.samples:
                raise DataError(f"benchmark '{name}' has one image; none can be permuted.")

    def blind(self) -> tuple[list[int], list[Sample]]:
        """Rows of the blind run, and their samples with permuted images."""
        means_something = getattr(self.benchmark, "permuted", True)
        own = self.settings.images == "own" and means_something
        rows = _blind_rows(self.benchmark, self.samples, self.settings.blind if own else "none")
        return rows, permute_images([self.samples[row] for row in rows], self.settings.seed)

    def guesses(self) -> list[str]:
        """The prior's answers, empty without a training split."""
        prior = self.benchmark.prior
        return [] if prior is None else [prior.guess(sample) for sample in self.samples]


def _select(name: str, benchmark: Benchmark, limit: int | None, seed: int) -> list[Sample]:
    every = benchmark.samples
    if limit is not None and limit < len(every):
        samples = [every[i] for i in image_subset(clusters_of(every), limit, seed)]
    else:
        samples = [every[i] for i in range(len(every))]
    if not samples:
        raise DataError(f"benchmark '{name}' has no sample; check its data.")
    counts = Counter(sample.id for sample in samples)
    double = [key for key, count in counts.items() if count > 1]
    if double:
        raise DataError(
            f"benchmark '{name}' has {len(double)} sample ids more than once, the first is "
            f"'{double[0]}'; records are joined by id, so give each sample its own."
        )
    return samples


def _blind_rows(benchmark: Benchmark, samples: list[Sample], blind: str) -> list[int]:
    """Rows of the blind run: the committed ids if all are there, else drawn by a fixed rule."""
    if blind == "none":
        return []
    if blind == "all":
        return list(range(len(samples)))
    places = {sample.id: row for row, sample in enumerate(samples)}
    if benchmark.blind_ids and all(key in places for key in benchmark.blind_ids):
        return [places[key] for key in benchmark.blind_ids]
    return image_subset(clusters_of(samples), BLIND_SIZE, BLIND_RULE)

"""Near-duplicates between training images and a benchmark: flagged, and the clean part scored too.

A picture is remembered by its content hash and by 8 x 8 mean colours. Two pictures are the same if
the hashes agree, or if the mean colours differ by no more than compression and resizing change
them. Crops, flips and equal words are not found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from triptych.evaluation.benchmark import Benchmark, Metrics, Record
from triptych.evaluation.scorers import Outcome
from triptych.types import DataError, ImageRef, Sample

GRID = 8  # cells a side
MEAN, MOST = 4.0, 16.0  # largest root mean square, and largest single difference, of 0..255
RULE = f"sha1 or {GRID}x{GRID} mean colours within rms {MEAN:g}, max {MOST:g}"
MANIFEST = "training_images.npz"
_ROWS = 2048  # training images compared at a time: (2048, benchmark images) floats


@dataclass
class Manifest:
    """The distinct images of a training set."""

    keys: np.ndarray  # (N,) content hashes
    names: np.ndarray  # (N,)
    colors: np.ndarray  # (N, GRID*GRID*3) uint8

    @classmethod
    def of(cls, refs: Iterable[ImageRef]) -> Manifest:
        """Open each distinct image once. A broken file is left out: nothing learned from it."""
        distinct = {}
        for ref in refs:
            distinct.setdefault(ref.key, ref)
        kept = []
        for ref in distinct.values():
            try:
                kept.append((ref.key, ref.name, mean_colors(ref)))
            except (DataError, OSError):
                continue
        keys, names, colors = zip(*kept, strict=True) if kept else ((), (), ())
        made = np.array(colors, np.uint8).reshape(len(keys), GRID * GRID * 3)
        return cls(np.array(keys, str), np.array(names, str), made)

    def save(self, path: Path) -> None:
        np.savez_compressed(path, keys=self.keys, names=self.names, colors=self.colors)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["keys"], stored["names"], stored["colors"])

    def duplicates(self, refs: Sequence[ImageRef]) -> dict[str, str]:
        """key -> name of the training image that shows the same, for those that have one."""
        known = {str(key): str(name) for key, name in zip(self.keys, self.names, strict=True)}
        found = {ref.key: known[ref.key] for ref in refs if ref.key in known}
        rest = list({ref.key: ref for ref in refs if ref.key not in known}.values())
        if not rest or not len(self.keys):
            return found
        asked = np.stack([mean_colors(ref) for ref in rest]).astype(np.float32)  # (M,192)
        for start in range(0, len(self.colors), _ROWS):
            block = self.colors[start : start + _ROWS].astype(np.float32)  # (n,192)
            squares = (asked**2).sum(1)[:, None] + (block**2).sum(1) - 2 * asked @ block.T
            near = squares <= MEAN**2 * asked.shape[1] + 1e-2  # (M,n)
            for i, j in zip(*np.nonzero(near), strict=True):
                if np.abs(asked[i] - block[j]).max() <= MOST:
                    found.setdefault(rest[i].key, str(self.names[start + j]))
        return found


def mean_colors(ref: ImageRef) -> np.ndarray:
    """(192,) mean colours of the cells of an 8 x 8 grid, 0..255."""
    from PIL import Image

    small = ref.open().convert("RGB").resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small, np.uint8).reshape(-1)


class Watched:
    """What a benchmark gains when its duplicates are known; see `watch`."""

    flags: dict[str, str]  # sample id -> the training image that it repeats

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """The row, with the training image that one of its images repeats."""
        return super().record(sample, outcome) | {"contaminated": self.flags.get(sample.id)}

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Every metric, and each that is no slice once more over the clean samples alone."""
        made = super().metrics(records)
        clean = [record for record in records if record["contaminated"] is None]
        facts = {"contaminated": 1 - len(clean) / len(records), "contamination_rule": RULE}
        for key, entry in made.items():
            entry |= facts if "/" not in key else {}
        if not clean or len(clean) == len(records):
            return made
        again = super().metrics(clean)
        return made | {f"{key}/clean": entry for key, entry in again.items() if "/" not in key}


def watch(benchmark: Benchmark, manifest: Manifest) -> Benchmark:
    """The same benchmark, whose records say what they repeat of the training images."""
    samples = [benchmark.samples[i] for i in range(len(benchmark.samples))]
    known = manifest.duplicates([ref for sample in samples for ref in sample.images])
    flags = {}
    for sample in samples:
        names = [known[ref.key] for ref in sample.images if ref.key in known]
        flags |= {sample.id: names[0]} if names else {}
    kind = type(benchmark)
    made: Any = copy.copy(benchmark)
    made.__class__ = type(kind.__name__, (Watched, kind), {"__module__": __name__})
    made.flags = flags
    return made


def watch_all(
    benchmarks: Mapping[str, Benchmark], trained: DictConfig | None, run: Path | None
) -> dict[str, Benchmark]:
    """The benchmarks with the duplicates of a run's training images flagged; says how many.

    The images are read once a run and remembered beside it, unless its data have changed.
    """
    manifest = None if trained is None else _manifest(trained, run)
    if manifest is None:
        print("contamination: not checked, the training images of this model are not known here.")
        return dict(benchmarks)
    watched = {name: watch(benchmark, manifest) for name, benchmark in benchmarks.items()}
    for name, benchmark in watched.items():
        print(
            f"{name}: {len(benchmark.flags):,} of {len(benchmark.samples):,} samples repeat one of "
            f"{len(manifest.keys):,} training images."
        )
    return watched


def _manifest(trained: DictConfig, run: Path | None) -> Manifest | None:
    from triptych.build import build
    from triptych.evaluation.identity import digest

    node = trained.data.get("train") if trained.get("data") else None
    if node is None:
        return None
    wanted = digest(OmegaConf.to_container(trained.data, resolve=True))
    path = None if run is None else run / f"{wanted}.{MANIFEST}"
    if path is not None and path.is_file():
        return Manifest.load(path)
    reader = build(OmegaConf.create(OmegaConf.to_container(trained.data, resolve=True)["train"]))
    if not hasattr(reader, "__getitem__"):
        return None  # a stream: reading it all again is the training's business
    rows = (reader[i] for i in range(len(reader)))
    manifest = Manifest.of(ref for sample in rows for ref in sample.images)
    if path is not None:
        manifest.save(path)
    return manifest

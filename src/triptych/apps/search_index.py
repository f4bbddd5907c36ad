"""An index of image vectors on disk: memory-mapped, updated by file, complete or not there.

INDEX/index.json names the current generation, a folder with `vectors.npy` (N,E) float32 and
`files.parquet`, in whose order the vectors stand. While a folder is embedded, finished blocks lie
in INDEX/pending, where an interrupted update finds them again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from triptych.data.images import open_image
from triptych.data.pairs import SUFFIXES
from triptych.types import DataError, ImageRef, TriptychError

if TYPE_CHECKING:
    import pyarrow as pa

    from triptych.evaluation.model_predictor import ModelPredictor

BLOCK = 512  # images embedded between two saves
ROWS = 65_536  # vectors compared at a time


@dataclass
class Report:
    """What an update did."""

    total: int = 0
    embedded: int = 0
    kept: int = 0
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Index:
    """An opened index; vectors stay on disk until they are compared."""

    place: Path
    facts: dict[str, Any]  # run, model (its fingerprint), folder, generation
    files: pa.Table  # name, size, mtime of every vector

    @classmethod
    def open(cls, place: Path) -> Index:
        """The current generation of an index."""
        import pyarrow.parquet as pq

        if not (place / "index.json").is_file():
            raise TriptychError(
                f"there is no index at '{place}'; make one with: python -m triptych.apps.search "
                f"index DIR --run RUN --index {place}"
            )
        facts = json.loads((place / "index.json").read_text())
        return cls(place, facts, pq.read_table(place / facts["generation"] / "files.parquet"))

    def name(self, row: int) -> str:
        """The file of a vector, relative to the indexed folder."""
        return self.files["name"][row].as_py()

    def stamps(self) -> Iterator[tuple[str, int, int]]:
        """Name, size and modification time of every vector's file, in their order."""
        return zip(*(self.files[n].to_pylist() for n in ("name", "size", "mtime")), strict=True)

    @property
    def vectors(self) -> np.ndarray:
        """(N,E) float32, memory-mapped."""
        return np.load(self.place / self.facts["generation"] / "vectors.npy", mmap_mode="r")

    def nearest(self, queries: np.ndarray, k: int) -> list[tuple[str, float]]:
        """Paths and cosines of the k nearest images to (K,E) unit vectors, the nearest of K counts.

        Exact, unless a faiss index was built. Equal cosines are ordered by path.
        """
        if k < 1:
            raise TriptychError(f"-k is {k}; it starts at 1.")
        queries = np.asarray(queries, np.float32)
        if (self.place / self.facts["generation"] / "vectors.faiss").is_file():
            found = self._faiss(queries, k)
        else:
            found = self._exact(queries, k)
        folder = Path(self.facts["folder"])
        named = [(-cosine, self.name(row)) for row, cosine in found]
        return [(str(folder / name), -cosine) for cosine, name in sorted(named)[:k]]

    def _exact(self, queries: np.ndarray, k: int) -> list[tuple[int, float]]:
        vectors, best = self.vectors, []
        for start in range(0, len(vectors), ROWS):
            scores = (vectors[start : start + ROWS] @ queries.T).max(1)
            least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
            rows = np.flatnonzero(scores >= least)  # ties at the edge are all kept
            best += [(start + int(row), float(scores[row])) for row in rows]
        return best

    def build_faiss(self) -> str:
        """Add an inverted-file index, which reads only the lists near a query; returns its kind."""
        faiss = _import_faiss()
        vectors = self.vectors
        lists = max(1, min(65_536, int(4 * len(vectors) ** 0.5), len(vectors) // 39))
        kind = f"IVF{lists},Flat"
        made = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        some = np.random.default_rng(0).permutation(len(vectors))[: 64 * lists]
        made.train(np.ascontiguousarray(vectors[np.sort(some)]))
        for start in range(0, len(vectors), ROWS):
            made.add(np.ascontiguousarray(vectors[start : start + ROWS]))
        target = self.place / self.facts["generation"] / "vectors.faiss"
        faiss.write_index(made, str(target) + ".part")
        os.replace(str(target) + ".part", target)
        return kind

    def _faiss(self, queries: np.ndarray, k: int) -> list[tuple[int, float]]:
        faiss = _import_faiss()
        path = self.place / self.facts["generation"] / "vectors.faiss"
        made = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        made.nprobe = max(8, made.nlist // 32)
        scores, rows = made.search(queries, min(k, len(self.files)))
        best: dict[int, float] = {}
        for row, score in zip(rows.ravel().tolist(), scores.ravel().tolist(), strict=True):
            if row >= 0:
                best[row] = max(score, best.get(row, -2.0))
        return list(best.items())


def update(
    folder: Path, place: Path, run: str, model: ModelPredictor, rebuild: bool = False
) -> Report:
    """Embed the new and changed images of a folder, forget the deleted ones, report the unreadable.

    A file is unchanged if its size and modification time are; the index of another model is never
    mixed with this one's.
    """
    from triptych.apps.search import fingerprint

    if not folder.is_dir():
        raise TriptychError(f"'{folder}' is no folder of images; check the path.")
    place.mkdir(parents=True, exist_ok=True)
    known = Index.open(place) if (place / "index.json").is_file() and not rebuild else None
    hashed = fingerprint(model)
    if known is not None and known.facts["model"] != hashed:
        raise TriptychError(
            f"the model '{run}' has changed since the index at '{place}' was made; add --rebuild."
        )
    pending = place / "pending"
    if rebuild or _owner(pending) != hashed:
        shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(exist_ok=True)
    (pending / "model").write_text(hashed)
    found = {_stamp(file, folder): file for file in _images(folder, place)}
    old = {stamp: i for i, stamp in enumerate(known.stamps())} if known else {}
    report = Report(kept=sum(stamp in old for stamp in found))
    done = {stamp for stamps, _, _ in _blocks(pending) for stamp in stamps}
    todo = [stamp for stamp in found if stamp not in old and stamp not in done]
    _embed(todo, found, pending, model, report)
    _write(place, run, hashed, folder, known, old, found, pending, report)
    return report


def _embed(
    todo: list[tuple],
    found: dict[tuple, Path],
    pending: Path,
    model: ModelPredictor,
    report: Report,
) -> None:
    """Vectors of the files in blocks, each saved when it is whole."""
    from tqdm import tqdm

    number, transform = len(list(pending.glob("*.npz"))), model.processor.images.transform
    with tqdm(total=len(todo), desc="Embedding", unit="img") as bar:
        for start in range(0, len(todo), BLOCK):
            refs, stamps, bad = [], [], []
            for stamp in todo[start : start + BLOCK]:
                try:
                    picture = open_image(found[stamp])
                except DataError as error:
                    bad.append((stamp[0], str(error)))
                    continue
                pixels = transform(picture).permute(1, 2, 0).numpy()  # small, so a block fits
                refs.append(ImageRef(stamp[0], partial(Image.fromarray, pixels), stamp[0]))
                stamps.append(stamp)
            vectors = _vectors(model, refs) if refs else np.zeros((0, 1), np.float32)
            side = pending / f"{number:08d}.part.npz"
            np.savez(side, vectors=vectors, rows=json.dumps(stamps), bad=json.dumps(bad))
            os.replace(side, pending / f"{number:08d}.npz")
            number += 1
            bar.update(min(BLOCK, len(todo) - start))


def _vectors(model: ModelPredictor, refs: list[ImageRef]) -> np.ndarray:
    embedded = model.embed_images(refs)  # (N,K,E)
    if embedded.shape[1] != 1:
        raise TriptychError(
            f"this model gives {embedded.shape[1]} vectors an image and the index holds one; use a "
            "contrastive run (clip, siglip, align)."
        )
    return embedded[:, 0].numpy()


def _write(
    place: Path,
    run: str,
    hashed: str,
    folder: Path,
    known: Index | None,
    old: dict[tuple, int],
    found: dict[tuple, Path],
    pending: Path,
    report: Report,
) -> None:
    """A new generation of old and new vectors, sorted by name, put in place in one move."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fresh: dict[tuple, tuple[np.ndarray, int]] = {}
    for stamps, vectors, bad in _blocks(pending):
        fresh |= {stamp: (vectors, i) for i, stamp in enumerate(stamps)}
        report.skipped += [one for one in bad if one not in report.skipped]
    keep = sorted(stamp for stamp in found if stamp in old or stamp in fresh)
    report.embedded = sum(stamp in fresh for stamp in keep)
    report.removed = len({s[0] for s in old} - {s[0] for s in found})
    report.total = len(keep)
    if not keep:
        raise TriptychError(f"'{folder}' holds no image that can be read; nothing is indexed.")
    if known is not None and not fresh and len(keep) == len(old):
        shutil.rmtree(pending)
        return
    number = int(known.facts["generation"].partition("-")[2]) + 1 if known else 1
    side = place / f"generation-{number}"
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir()
    width = next(iter(fresh.values()))[0].shape[1] if fresh else known.vectors.shape[1]
    target = np.lib.format.open_memmap(side / "vectors.npy", "w+", np.float32, (len(keep), width))
    before = known.vectors if known else None
    for row, stamp in enumerate(keep):
        block, at = fresh[stamp] if stamp in fresh else (before, old[stamp])
        target[row] = block[at]
    target.flush()
    columns = dict(zip(("name", "size", "mtime"), zip(*keep, strict=True), strict=True))
    pq.write_table(pa.table({n: list(v) for n, v in columns.items()}), side / "files.parquet")
    facts = {"run": run, "model": hashed, "folder": str(folder.resolve()), "generation": side.name}
    (place / "index.part").write_text(json.dumps(facts, indent=1))
    os.replace(place / "index.part", place / "index.json")
    shutil.rmtree(pending)
    for other in place.glob("generation-*"):
        if other.name != side.name:
            shutil.rmtree(other)


def _images(folder: Path, place: Path) -> Iterator[Path]:
    """Files that are called like images; no hidden ones, no links out, and not the index itself."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f[0] != "." and Path(parent, f) != place)
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and name[0] != "." and not path.is_symlink():
                yield path


def _stamp(file: Path, folder: Path) -> tuple[str, int, int]:
    about = file.stat()
    return (str(file.relative_to(folder)), about.st_size, about.st_mtime_ns)


def _blocks(pending: Path) -> Iterator[tuple[list[tuple], np.ndarray, list[tuple[str, str]]]]:
    for path in sorted(pending.glob("[0-9]*.npz")):
        if path.name.endswith(".part.npz"):
            continue
        with np.load(path, allow_pickle=False) as block:
            stamps = [tuple(stamp) for stamp in json.loads(str(block["rows"]))]
            bad = [tuple(one) for one in json.loads(str(block["bad"]))]
            yield stamps, block["vectors"], bad


def _owner(pending: Path) -> str:
    path = pending / "model"
    return path.read_text() if path.is_file() else ""


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise TriptychError(
            "this needs faiss; pip install faiss-cpu, or build the index without --faiss."
        ) from None
    return faiss

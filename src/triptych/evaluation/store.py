"""Answers on disk: a line a sample, appended batch by batch, so that a crash keeps whole batches.

    DIR/predictions/NAME.json         what the answers depend on (the header)
    DIR/predictions/NAME.jsonl        answers of earlier processes; in the end all, in order
    DIR/predictions/NAME.rank0.jsonl  what a process is appending
    DIR/predictions/NAME.times.jsonl  what each batch cost; no other file holds a time

The batches are a function of all samples, so a resumed run and several ranks take whole batches
and end in the bytes of one process that was never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triptych.distributed import rank, wait
from triptych.evaluation.records import write_json
from triptych.evaluation.scorers import Outcome
from triptych.types import TriptychError

FOLDER = "predictions"


class Answers:
    """The answers to one list of samples under one header, shared by all ranks of a folder.

    header: plain values; answers under another header are those of another model, other data or
    other batches, and are put aside as NAME.before.jsonl. batches: rows of `ids` that run together.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        header: dict[str, Any],
        ids: Sequence[str],
        batches: Sequence[Sequence[int]],
    ) -> None:
        self.folder, self.name, self.header = folder, name, header
        self.ids, self.batches = ids, batches
        self.changed: list[str] = []  # what of the header was different before
        self._file: Any = None

    def open(self) -> dict[str, Outcome]:
        """The answers of whole batches that are there already. Every rank has to call this."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.changed = self._changes()
            if self.changed:
                self._clear()
            write_json(self._path("json"), self.header)
            self._write(self._whole(self._read()))
        wait()
        return self._read()

    def append(self, rows: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Keep the answers of one batch: in the file when this returns."""
        lines = (_line(self.ids[r], o) for r, o in zip(rows, outcomes, strict=True))
        if self._file is None:
            self._file = open(self._path(f"rank{rank()}.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
        self._file.write("".join(lines))
        self._file.flush()

    def note(self, **facts: Any) -> None:
        """Keep what something cost, apart from the answers."""
        with open(self._path("times.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"rank": rank(), **facts}, sort_keys=True) + "\n")

    def finish(self) -> list[Outcome]:
        """All answers in the order of the samples, from every rank; each has to call this."""
        if self._file is not None:
            self._file.close()
            self._file = None
        wait()
        if rank() == 0:
            there = self._read()
            missing = [key for key in self.ids if key not in there]
            if missing:
                raise TriptychError(
                    f"{len(missing)} answers of '{self.name}' are missing in {self.folder} (first: "
                    f"'{missing[0]}'); all processes have to write to one shared folder."
                )
            self._write(there)
            shutil.rmtree(self.scratch, ignore_errors=True)
        wait()
        there = self._read()
        return [there[key] for key in self.ids]

    @property
    def scratch(self) -> Path:
        """A folder for what is worth keeping until all answers are there."""
        return self.folder / f"{self.name}.scratch"

    def times(self) -> list[dict[str, Any]]:
        """What every batch cost, whichever process ran it."""
        path = self._path("times.jsonl")
        return list(_rows(path)) if path.exists() else []

    def _changes(self) -> list[str]:
        path = self._path("json")
        if not path.exists():
            return []
        before = json.loads(path.read_text(encoding="utf-8"))
        after = json.loads(json.dumps(self.header))
        keys = sorted((before.keys() | after.keys()) - {"hash"})
        return [key for key in keys if before.get(key) != after.get(key)]

    def _clear(self) -> None:
        lines = [_line(key, outcome) for key, outcome in self._read().items()]
        self._path("before.jsonl").write_text("".join(lines), encoding="utf-8")
        for path in [*self._parts(), self._path("times.jsonl")]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _read(self) -> dict[str, Outcome]:
        return {key: outcome for path in self._parts() for key, outcome in _outcomes(path)}

    def _whole(self, there: dict[str, Outcome]) -> dict[str, Outcome]:
        """Without batches that a crash cut off: they run again as a whole."""
        kept: dict[str, Outcome] = {}
        for rows in self.batches:
            keys = [self.ids[row] for row in rows]
            if all(key in there for key in keys):
                kept |= {key: there[key] for key in keys}
        return kept

    def _write(self, answers: dict[str, Outcome]) -> None:
        """Move everything into the one ordered file; the ranks' files go when it stands."""
        path, beside = self._path("jsonl"), self._path("jsonl.part")
        lines = (_line(key, answers[key]) for key in self.ids if key in answers)
        beside.write_text("".join(lines), encoding="utf-8")
        os.replace(beside, path)
        for part in self._parts():
            if part != path:
                part.unlink()

    def _parts(self) -> list[Path]:
        whole = self._path("jsonl")
        stem = f"{self.name}.rank"
        ranks = (p for p in self.folder.iterdir() if p.name.startswith(stem))
        return [p for p in [whole, *sorted(ranks)] if p.exists()]

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.name}.{ending}"


def stored_answers(folder: Path, name: str, ids: Iterable[str]) -> list[Outcome]:
    """Finished answers by sample id. Raises TriptychError if one is missing."""
    path = folder / f"{name}.jsonl"
    there = dict(_outcomes(path)) if path.exists() else {}
    wanted = list(ids)
    missing = [key for key in wanted if key not in there]
    if missing:
        raise TriptychError(
            f"{path} lacks {len(missing)} answers (first: '{missing[0]}'); the evaluation did not "
            "end, or its data changed: run evaluate.py again."
        )
    return [there[key] for key in wanted]


def _line(key: str, outcome: Outcome) -> str:
    row = {"id": key, **{k: v for k, v in asdict(outcome).items() if v not in (None, [], {})}}
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"


def _outcomes(path: Path) -> Iterator[tuple[str, Outcome]]:
    for row in _rows(path):
        key = row.pop("id")
        yield key, Outcome(**{"raw": "", **row})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a last one cut short by a crash is left out."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)

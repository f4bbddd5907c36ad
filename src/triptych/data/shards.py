"""Arrays by image key, memory-mapped: a folder with a shard for each time images were added."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class Shards:
    """What is stored under `settings`: all that decides the numbers, hashed into the folder's name.

    A shard holds arrays of one length and the keys of their rows. It appears whole or not at all.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def rows(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Copies of the rows of some images, in their order, by the names of their arrays."""
        shards, rows = np.array([self._rows[key] for key in keys]).T
        if (shards == shards[0]).all():
            return {name: array[rows] for name, array in self._arrays[shards[0]].items()}
        found = {}
        for name, array in self._arrays[shards[0]].items():
            found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
            for shard in set(shards):
                here = shards == shard
                found[name][here] = self._arrays[shard][name][rows[here]]
        return found

    @contextmanager
    def adding(self, keys: Sequence[str]) -> Iterator[Path]:
        """A folder in which to write NAME.npy, a row a key; it becomes a shard when this ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".filling-", dir=self.folder))
        yield work
        (work / "keys.json").write_text(json.dumps(list(keys)))
        os.rename(work, self.folder / f"shard-{work.name.removeprefix('.filling-')}")
        self._read()

    def _read(self) -> None:
        self._rows: dict[str, tuple[int, int]] = {}  # image key -> (shard, row)
        self._arrays: list[dict[str, np.ndarray]] = []
        for number, shard in enumerate(sorted(self.folder.glob("shard-*"))):
            files = sorted(shard.glob("*.npy"))
            self._arrays.append({file.stem: np.load(file, mmap_mode="r") for file in files})
            for row, key in enumerate(json.loads((shard / "keys.json").read_text())):
                self._rows[key] = (number, row)

"""Pictures as uint8 tensors in a memory-mapped file: decoded and resized once, for all runs.

For vision encoders that train, whose features cannot be kept. The key holds the transform, so a
run with other sizes or filters reads other files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from triptych.data.transforms import ImageTransform
from triptych.types import ImageRef


class PixelCache:
    """Pixels by image key, as `transform` gives them."""

    def __init__(self, folder: str | Path, transform: ImageTransform) -> None:
        text = json.dumps(vars(transform), sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.transform = transform
        self._rows: dict[str, tuple[int, int]] = {}  # image key -> (shard, row)
        self._shards: list[np.ndarray] = []
        self._open()

    def get(self, key: str) -> Tensor | None:
        """(3,H,W) uint8, or None if this image was not there when the cache was filled."""
        place = self._rows.get(key)
        if place is None:
            return None
        return torch.from_numpy(self._shards[place[0]][place[1]].copy())

    def fill(self, refs: Iterable[ImageRef], limit_gb: float, progress: bool = True) -> bool:
        """Decode what is missing; False if that would pass the limit, and nothing is kept."""
        todo: dict[str, ImageRef] = {}
        most = limit_gb * 2**30 // self.item_bytes
        for ref in refs:
            if ref.key not in self._rows:
                todo[ref.key] = ref
            if len(todo) > most:
                return False
        if not todo:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".filling-", dir=self.folder))
        shape = (len(todo), 3, *self.transform.size)
        pixels = np.lib.format.open_memmap(work / "pixels.npy", "w+", np.uint8, shape)
        bar = tqdm(todo.values(), desc="Decoding images once", unit="img", disable=not progress)
        for row, ref in enumerate(bar):
            pixels[row] = self.transform.read(ref).numpy()
        pixels.flush()
        (work / "keys.json").write_text(json.dumps(list(todo)))
        os.rename(work, self.folder / f"shard-{work.name.removeprefix('.filling-')}")
        self._open()
        return True

    @property
    def item_bytes(self) -> int:
        """Bytes of one image."""
        height, width = self.transform.size
        return 3 * height * width

    def _open(self) -> None:
        self._rows, self._shards = {}, []
        for shard in sorted(self.folder.glob("shard-*")):
            self._shards.append(np.load(shard / "pixels.npy", mmap_mode="r"))
            for row, key in enumerate(json.loads((shard / "keys.json").read_text())):
                self._rows[key] = (len(self._shards) - 1, row)

"""Pictures as uint8 tensors in a memory-mapped file: decoded and resized once, for all runs.

For vision encoders that train, whose features cannot be kept. The key holds the transform, so a
run with other sizes or filters reads other files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from triptych.data.shards import Shards
from triptych.data.transforms import ImageTransform
from triptych.types import ImageRef


class PixelCache(Shards):
    """Pixels by image key, as `transform` gives them."""

    def __init__(self, folder: str | Path, transform: ImageTransform) -> None:
        super().__init__(folder, vars(transform))
        self.transform = transform

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """(U,3,H,W) uint8 of images that are all in the cache."""
        return torch.from_numpy(self.rows(keys)["pixels"])

    def fill(self, refs: Iterable[ImageRef], limit_gb: float, progress: bool = True) -> bool:
        """Decode what is missing; False if that would pass the limit, and nothing is kept."""
        todo: dict[str, ImageRef] = {}
        most = limit_gb * 2**30 // self.item_bytes
        for ref in refs:
            if ref.key not in self:
                todo[ref.key] = ref
            if len(todo) > most:
                return False
        if not todo:
            return True
        shape = (len(todo), 3, *self.transform.size)
        with self.adding(list(todo)) as work:
            pixels = np.lib.format.open_memmap(work / "pixels.npy", "w+", np.uint8, shape)
            bar = tqdm(todo.values(), desc="Decoding images once", unit="img", disable=not progress)
            for row, ref in enumerate(bar):
                pixels[row] = self.transform.read(ref).numpy()
            pixels.flush()
        return True

    @property
    def item_bytes(self) -> int:
        """Bytes of one image."""
        height, width = self.transform.size
        return 3 * height * width

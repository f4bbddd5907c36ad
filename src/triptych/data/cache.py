"""Features of a frozen vision encoder, computed once and read back ever after.

The key holds all that decides the numbers: the encoder's weights and layer, the transform, the
dtype. Features are always computed by calls of one fixed shape and always read from the cache,
the first time too, so that a resumed run sees the same bits as an uninterrupted one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from triptych.data.shards import Shards
from triptych.parts.vision import VisionEncoder
from triptych.types import ImageFeatures, ImageRef, Images, TriptychError

BATCH = 64  # images of every call


class FeatureCache(Shards):
    """Token states, and pooled states where the encoder has them, by image key."""

    def __init__(self, folder: str | Path, encoder: VisionEncoder, fingerprint: str) -> None:
        settings = {
            "weights": fingerprint,
            "config": encoder.config.to_dict(),
            "layer": encoder.layer,
            "select": encoder.select,
            "tokens": not getattr(encoder, "pooled_only", False),
            "transform": vars(encoder.transform),
            "dtype": str(encoder.model.dtype),
            "attention": encoder.model.config._attn_implementation,
            "torch": torch.__version__,
        }
        super().__init__(folder, settings)
        self.encoder = encoder

    def fill(self, refs: Iterable[ImageRef], limit_gb: float, progress: bool = True) -> bool:
        """Compute what is missing; False if that would pass the limit, and nothing is kept."""
        todo = {ref.key: ref for ref in refs if ref.key not in self}
        if not todo:
            return True
        size = self.encoder.transform.size
        tokens = self.encoder.num_tokens(*size)
        item = self.encoder.model.dtype.itemsize
        if len(todo) * (tokens + 1) * self.encoder.dim * item > limit_gb * 2**30:
            return False
        bar = tqdm(total=len(todo), desc="Encoding images once", unit="img", disable=not progress)
        self._write(list(todo.values()), bar)
        bar.close()
        return True

    def __call__(self, refs: Sequence[ImageRef]) -> ImageFeatures:
        """Cached features of these images, flat, in their order."""
        for ref in refs:
            if ref.key not in self:
                raise TriptychError(
                    f"the image '{ref.name}' is not in the feature cache; the data changed while "
                    "the run was going: start it again."
                )
        rows = self.rows([ref.key for ref in refs])
        found = {name: _tensor(array, self.encoder.model.dtype) for name, array in rows.items()}
        tokens = found["tokens"]  # (U,P,D)
        counts = torch.full((len(tokens),), tokens.shape[1])
        return ImageFeatures(tokens.flatten(0, 1), counts, found.get("pooled"))

    @torch.inference_mode()
    def _write(self, refs: list[ImageRef], bar: tqdm) -> None:
        arrays: dict[str, np.ndarray] = {}
        was_training, device = self.encoder.training, next(self.encoder.parameters()).device
        self.encoder.eval()
        with self.adding([ref.key for ref in refs]) as work:
            for start, pixels in self._pixels(refs):
                features = self.encoder(Images([], pixels=pixels.to(device)))
                count = min(BATCH, len(refs) - start)
                found = {"tokens": features.tokens.view(BATCH, -1, self.encoder.dim)}
                found |= {} if features.pooled is None else {"pooled": features.pooled}
                for name, states in found.items():
                    made = _array(states)
                    if name not in arrays:
                        shape = (len(refs), *made.shape[1:])
                        arrays[name] = np.lib.format.open_memmap(
                            work / f"{name}.npy", "w+", made.dtype, shape
                        )
                    arrays[name][start : start + count] = made[:count]
                bar.update(count)
            for array in arrays.values():
                array.flush()
        self.encoder.train(was_training)

    def _pixels(self, refs: list[ImageRef]) -> Iterator[tuple[int, torch.Tensor]]:
        """Batches of one shape; the last is filled up with zeros."""
        for start in range(0, len(refs), BATCH):
            pictures = [self.encoder.transform.read(r) for r in refs[start : start + BATCH]]
            pixels = torch.stack(pictures)
            short = BATCH - len(pixels)
            yield start, torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])])


def cache_dir() -> Path:
    """Where caches live: TRIPTYCH_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRIPTYCH_CACHE") or Path(base) / "triptych")


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor

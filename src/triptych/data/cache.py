"""Features of a frozen vision encoder, computed once and read back ever after.

The key holds all that decides the numbers: the encoder's weights and layer, the transform, the
dtype. Features are always computed by calls of one fixed shape and always read from the cache,
the first time too, so that a resumed run sees the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from triptych.parts.vision import VisionEncoder
from triptych.types import ImageFeatures, ImageRef, Images, TriptychError

BATCH = 64  # images of every call


class FeatureCache:
    """A folder of memory-mapped shards, one for each time images were added."""

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
        text = json.dumps(settings, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.encoder = encoder
        self._rows: dict[str, tuple[int, int]] = {}  # image key -> (shard, row)
        self._shards: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._open()

    def fill(self, refs: Iterable[ImageRef], limit_gb: float, progress: bool = True) -> bool:
        """Compute what is missing; False if that would pass the limit, and nothing is kept."""
        todo = {ref.key: ref for ref in refs if ref.key not in self._rows}
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
        self._open()
        return True

    def __call__(self, refs: Sequence[ImageRef]) -> ImageFeatures:
        """Cached features of these images, flat, in their order."""
        tokens, pooled = [], []
        for ref in refs:
            if ref.key not in self._rows:
                raise TriptychError(
                    f"the image '{ref.name}' is not in the feature cache; the data changed while "
                    "the run was going: start it again."
                )
            shard, row = self._rows[ref.key]
            tokens.append(self._shards[shard][0][row])
            if self._shards[shard][1] is not None:
                pooled.append(self._shards[shard][1][row])
        stacked = _tensor(np.stack(tokens), self.encoder.model.dtype)  # (U,P,D)
        counts = torch.full((len(tokens),), stacked.shape[1])
        vectors = _tensor(np.stack(pooled), self.encoder.model.dtype) if pooled else None
        return ImageFeatures(stacked.flatten(0, 1), counts, vectors)

    @torch.inference_mode()
    def _write(self, refs: list[ImageRef], bar: tqdm) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".filling-", dir=self.folder))
        tokens: np.ndarray | None = None
        pooled: np.ndarray | None = None
        was_training, device = self.encoder.training, next(self.encoder.parameters()).device
        self.encoder.eval()
        for start, pixels in self._pixels(refs):
            features = self.encoder(Images([], pixels=pixels.to(device)))
            count = min(BATCH, len(refs) - start)
            grid = _array(features.tokens.view(BATCH, -1, self.encoder.dim))
            if tokens is None:
                shape = (len(refs), *grid.shape[1:])
                tokens = np.lib.format.open_memmap(work / "tokens.npy", "w+", grid.dtype, shape)
            tokens[start : start + count] = grid[:count]
            if features.pooled is not None:
                vector = _array(features.pooled)
                if pooled is None:
                    shape = (len(refs), vector.shape[1])
                    pooled = np.lib.format.open_memmap(
                        work / "pooled.npy", "w+", vector.dtype, shape
                    )
                pooled[start : start + count] = vector[:count]
            bar.update(count)
        self.encoder.train(was_training)
        tokens.flush()
        if pooled is not None:
            pooled.flush()
        (work / "keys.json").write_text(json.dumps([ref.key for ref in refs]))
        os.rename(work, self.folder / f"shard-{work.name.removeprefix('.filling-')}")

    def _pixels(self, refs: list[ImageRef]) -> Iterator[tuple[int, torch.Tensor]]:
        """Batches of one shape; the last is filled up with zeros."""
        for start in range(0, len(refs), BATCH):
            pictures = [self.encoder.transform.read(r) for r in refs[start : start + BATCH]]
            pixels = torch.stack(pictures)
            short = BATCH - len(pixels)
            yield start, torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])])

    def _open(self) -> None:
        self._rows, self._shards = {}, []
        for shard in sorted(self.folder.glob("shard-*")):
            pooled = shard / "pooled.npy"
            vectors = np.load(pooled, mmap_mode="r") if pooled.exists() else None
            self._shards.append((np.load(shard / "tokens.npy", mmap_mode="r"), vectors))
            for row, key in enumerate(json.loads((shard / "keys.json").read_text())):
                self._rows[key] = (len(self._shards) - 1, row)


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

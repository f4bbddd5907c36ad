"""DualEncoder: a vision and a text tower that meet in one embedding space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.data.processor import CaptionProcessor, ImageLoader
from triptych.models.base import Model
from triptych.parts.pooling import ModelPool
from triptych.parts.text import TextEncoder
from triptych.parts.vision import VisionEncoder
from triptych.types import Batch, ImageFeatures, Images, Tokens, TriptychError

Projection = Literal["linear", "mlp", "identity"]
GROUP, GROUPS = 32, 4  # captions of like length: at least so many run together, in so many groups
TRAFFIC = 1000  # FLOP in the time in which a gradient's number is zeroed, filled and added
Part = TypeVar("Part", Images, Tokens)


class Heads(nn.Module):
    """Pooling, the projections to the shared width E, and the learned scale of similarities.

    dim: E; null = the tower that is not projected decides. image, text: "linear" (CLIP), "mlp"
    (two layers with GELU), or "identity" where a tower's own output is the embedding (SigLIP, and
    the image side of ALIGN). scale: initial multiplier of the cosine, 1/0.07 in CLIP (arXiv
    2103.00020, section 2.5), 1 in ALIGN (arXiv 2102.05918), 10 in SigLIP (arXiv 2303.15343), kept
    at most `max_scale` after each step (null = never cut). bias: the sigmoid loss's.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        text: TextEncoder,
        dim: int | None = None,
        pool: Callable[[VisionEncoder], nn.Module] = ModelPool,
        image_projection: Projection = "linear",
        text_projection: Projection = "linear",
        projection_bias: bool = False,
        scale: float = 1 / 0.07,
        bias: float | None = None,
        max_scale: float | None = 100.0,
    ) -> None:
        super().__init__()
        self.pool = pool(vision)
        widths = {"image": self.pool.dim, "text": text.dim}
        kinds = {"image": image_projection, "text": text_projection}
        fixed = {widths[side] for side, kind in kinds.items() if kind == "identity"}
        self.dim = dim or (fixed.pop() if len(fixed) == 1 else 0)
        if not self.dim or fixed - {self.dim}:
            raise TriptychError(
                f"heads.dim={dim} does not fit: image vectors have {widths['image']} numbers, text "
                f"vectors {widths['text']}, and a side with projection=identity keeps its own; "
                "set heads.dim to that width, or choose linear."
            )
        self.image = _projection(kinds["image"], widths["image"], self.dim, projection_bias)
        self.text = _projection(kinds["text"], widths["text"], self.dim, projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.max_scale = max_scale


class DualEncoder(Model):
    """CLIP, SigLIP and ALIGN: images and texts are embedded apart and compared by a dot product.

    weights: an official checkpoint (folder or hub id) that fills both towers and the heads; its
    keys are told apart by `triptych.interop.dual`.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        text: TextEncoder,
        heads: Callable[[VisionEncoder, TextEncoder], Heads],
        weights: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.heads = heads(vision, text)
        if vision.layer == -1:
            vision.unused = vision.unreached(self.heads.pool.reads)
            if self.heads.pool.reads == "pooled":
                vision.read_pooled()
        text.unused = text.unreached()
        if weights is not None and torch.get_default_device().type != "meta":
            from triptych.interop.dual import load_official

            load_official(self, weights, revision)

    def forward(self, batch: Batch, chunk: int = 0) -> tuple[Tensor, Tensor]:
        """Image and text embeddings (B,E), one row a pair, unit norm."""
        images = self.embed_images(batch.images, chunk)[:, 0]  # (U,E)
        return images[batch.slots[:, 0]], self.embed_texts(batch.text["text"], chunk)

    def embed_images(self, images: Images, chunk: int = 0) -> Tensor:
        """(U,1,E) of unit norm; `chunk` images at a time keep their activations (0 = all)."""
        return self.project_images(_in_chunks(self.image_vectors, images, chunk))

    def embed_texts(self, tokens: Tokens, chunk: int = 0) -> Tensor:
        """(B,E) of unit norm; `chunk` rows at a time keep their activations (0 = all)."""
        return F.normalize(self.heads.text(_by_length(self.text, tokens, chunk)), dim=-1)

    def image_vectors(self, images: Images) -> Tensor:
        """(U,D) pooled vectors before the head: what a linear probe reads."""
        return self.heads.pool(self.features(images))

    def project_images(self, vectors: Tensor) -> Tensor:
        """(U,1,E) embeddings from pooled vectors (U,D)."""
        return F.normalize(self.heads.image(vectors), dim=-1)[:, None]

    def features(self, images: Images) -> ImageFeatures:
        """Tokens and pooled output of the images: cached ones, or computed now."""
        return images.features or self.vision(images)

    def processor(self) -> CaptionProcessor:
        """What turns samples into batches of this model."""
        return CaptionProcessor(self.text.encode, ImageLoader(self.vision.transform))

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        if self.heads.max_scale is not None:
            self.heads.logit_scale.clamp_(max=math.log(self.heads.max_scale))


def _in_chunks(
    run: Callable[[Part], Tensor], whole: Part, chunk: int, recompute: bool = False
) -> Tensor:
    """`run` over slices whose activations are computed again in the backward pass.

    Memory follows the chunk; dropout is replayed, so gradients equal those of one batch. Automatic
    optimization stays, unlike with hand-written gradient caching (arXiv 2101.06983).
    """
    size = len(whole) if isinstance(whole, Images) else len(whole.ids)
    cached = isinstance(whole, Images) and whole.pixels is None
    if recompute and size <= chunk:  # one chunk of several
        return checkpoint(run, whole, use_reentrant=False)
    if not chunk or size <= chunk or cached:
        return run(whole)
    parts = (slice(at, at + chunk) for at in range(0, size, chunk))
    pieces = _images(whole, parts) if isinstance(whole, Images) else _rows(whole, parts)
    return torch.cat([checkpoint(run, piece, use_reentrant=False) for piece in pieces])


def _by_length(text: TextEncoder, tokens: Tokens, chunk: int) -> Tensor:
    """Captions of like length run together, trimmed to the longest of them; the order stays.

    The batch is what it was, so no sample meets other negatives. Chunks are such groups anyway;
    else the padding that is saved must be worth more than the embeddings' gradients of each group.
    """
    lengths, (rows, width) = tokens.mask.sum(1), tokens.ids.shape
    size = chunk or max(GROUP, -(-rows // GROUPS))
    if rows <= size:
        return _in_chunks(text, tokens, chunk)
    order = lengths.argsort(stable=True)
    groups = order.split(size)
    longest = [int(lengths[group[-1]]) for group in groups]
    padding = rows * width - sum(n * len(group) for n, group in zip(longest, groups, strict=True))
    if not chunk and not _pays(text, padding, len(groups) - 1):
        return text(tokens)
    pieces = []
    for group, end in zip(groups, longest, strict=True):
        fields = (None if v is None else v[group, :end] for v in vars(tokens).values())
        pieces.append(_in_chunks(text, Tokens(*fields), chunk, recompute=bool(chunk)))
    return torch.cat(pieces)[order.argsort()]


def _pays(text: TextEncoder, padding: int, calls: int) -> bool:
    """Whether so many tokens less are worth so many calls more: FLOP against memory traffic."""
    tables = [m.weight for m in text.modules() if isinstance(m, nn.Embedding)]
    products = sum(p.numel() for p in text.parameters()) - sum(t.numel() for t in tables)
    trained = sum(t.numel() for t in tables if t.requires_grad and torch.is_grad_enabled())
    return 6 * products * padding > TRAFFIC * trained * calls


def _images(images: Images, parts: Iterator[slice]) -> Iterator[Images]:
    for part in parts:
        extra = {name: value[part] for name, value in images.extra.items()}
        yield Images(images.keys[part], images.pixels[part], extra=extra)


def _rows(tokens: Tokens, parts: Iterator[slice]) -> Iterator[Tokens]:
    for part in parts:
        yield Tokens(*(None if v is None else v[part] for v in vars(tokens).values()))


def _projection(kind: Projection, width: int, dim: int, bias: bool) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(width, width, bias=bias), nn.GELU(), nn.Linear(width, dim, bias=bias)
        )
    if kind != "linear":
        raise TriptychError(f"heads projections take linear, mlp or identity, not '{kind}'.")
    layer = nn.Linear(width, dim, bias=bias)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer

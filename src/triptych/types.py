"""What travels between the parts: samples, batches and features.

The letters used beside every line of this project:

    U  distinct images of a batch      T  tokens of a row            D  width of a part
    S  slots: places of an image       P  patches (vision tokens)    E  width of a shared embedding
    B  rows of a batch                 Q  visual tokens of a slot    V  vocabulary
    K  embeddings an image             N  supervised positions       M  most slots of a row
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from triptych.errors import DataError as DataError
from triptych.errors import TriptychError as TriptychError

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORE = -100  # a label that carries no loss
PAD, SHARED = 0, -1  # Tokens.segments: padding, and the row's shared prefix; samples count from 1


@dataclass
class ImageRef:
    """One image, opened only when its pixels are needed.

    `key` is the hash of the content, so that equal images are encoded once. `load` returns the
    RGB picture; `name` is what messages call it (a path, or "shapes/train/17"). `boxes` are known
    objects, (left, top, right, bottom) as shares of the picture. `drafts`: load takes `draft`, the
    pixels its shorter side must keep, and may decode a JPEG that much smaller.
    """

    key: str
    load: Callable[[], Image]
    name: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    drafts: bool = False

    def open(self, draft: int | None = None) -> Image:
        """The picture; `draft` pixels of its shorter side are enough for who asks."""
        return self.load(draft=draft) if draft and self.drafts else self.load()

    @classmethod
    def from_file(cls, path: str | Path, root: str | Path | None = None) -> ImageRef:
        """Reference a file; with `root`, a path that leaves it is refused."""
        from triptych.data.images import open_image, resolve_inside

        path = resolve_inside(path, root) if root is not None else Path(path)
        if not path.is_file():
            raise DataError(f"image '{path}' does not exist; check the path and data.images.")
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha1").hexdigest()
        return cls(key=key, load=partial(open_image, path), name=str(path), drafts=True)

    @classmethod
    def from_picture(cls, picture: Image, name: str = "picture") -> ImageRef:
        """Reference a picture already in memory."""
        buffer = io.BytesIO()
        picture = picture.convert("RGB")
        picture.save(buffer, format="BMP")
        return cls(content_key(buffer.getvalue()), picture.copy, name)


def content_key(data: bytes) -> str:
    """The key of an image from its bytes, the same whichever reader found them."""
    return hashlib.sha1(data).hexdigest()


@dataclass
class Sample:
    """One row of any data set, in chat format.

    `messages` is `[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]},
    {"role": "assistant", "content": [{"type": "text", "text": ...}]}]`; the images stand in reading
    order in `images`. A caption is an assistant turn that follows an image.
    `target` is the gold answer of an evaluation, `candidates` its closed list of answers, `cluster`
    the unit of independent sampling (the image), `group` ties samples scored together.
    """

    messages: list[dict]
    images: list[ImageRef] = field(default_factory=list)
    target: Any = None
    candidates: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    id: str = ""
    group: str = ""
    cluster: str = ""
    source: str = ""
    meta: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All words of the sample, for models that read a caption and hold no dialogue."""
        words = (p["text"] for m in self.messages for p in m["content"] if p["type"] == "text")
        return " ".join(words)

    @property
    def prompt(self) -> list[dict]:
        """The messages up to, and without, the last assistant turn."""
        last = len(self.messages) - 1
        ends = last >= 0 and self.messages[last]["role"] == "assistant"
        return self.messages[:last] if ends else self.messages


def user(text: str, images: int = 0) -> dict:
    """A user turn with `images` pictures in front of its text."""
    content: list[dict] = [{"type": "image"}] * images
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def assistant(text: str) -> dict:
    """An assistant turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@dataclass
class Tokens:
    """Token rows of one role (a language model, a text encoder, a decoder).

    segments: 0 = padding, -1 = the row's shared prefix (seen by every segment), 1.. = samples.
    labels are never shifted and are -100 where there is no loss; the objective shifts once.
    """

    ids: Tensor  # (B,T) int64
    positions: Tensor  # (B,T) int64, each segment continues after the prefix as if it stood alone
    segments: Tensor  # (B,T) int64
    labels: Tensor | None = None  # (B,T) int64
    types: Tensor | None = None  # (B,T) int64

    @property
    def mask(self) -> Tensor:
        """(B,T) True where there is a token."""
        return self.segments != PAD

    def to(self, device: torch.device, non_blocking: bool = False) -> Tokens:
        return Tokens(*(_to(v, device, non_blocking) for v in vars(self).values()))


class ImageFeatures(NamedTuple):
    """What a vision encoder returns: flat tokens, so that images may differ in size."""

    tokens: Tensor  # (sum P, D)
    counts: Tensor  # (U,) P of each image
    pooled: Tensor | None = None  # (U,D)


class VisualTokens(NamedTuple):
    """What a connector returns: flat tokens in the width of the language model."""

    tokens: Tensor  # (sum Q, D)
    counts: Tensor  # (U,) or, for connectors that read text, (S,)


@dataclass
class Images:
    """The distinct images of a batch: pixels, or the cached features of a frozen encoder."""

    keys: list[str]
    pixels: Tensor | None = None  # (U,3,H,W)
    features: ImageFeatures | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)  # what a library's processor adds

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, non_blocking: bool = False) -> Images:
        features = self.features and ImageFeatures(
            *(_to(v, device, non_blocking) for v in self.features)
        )
        extra = {k: _to(v, device, non_blocking) for k, v in self.extra.items()}
        return Images(self.keys, _to(self.pixels, device, non_blocking), features, extra)


@dataclass
class Batch:
    """One micro-batch: distinct images, the places they are written, and tokens by role."""

    images: Images | None
    slots: Tensor | None  # (S,3) = (image, row, segment) in reading order; segment -1 = prefix
    text: dict[str, Tokens]  # roles: language, text, decoder
    samples: list[Sample]
    totals: dict[str, int] = field(default_factory=dict)  # counts of the whole effective batch

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        images = self.images and self.images.to(device, non_blocking)
        slots = _to(self.slots, device, non_blocking)
        text = {role: tokens.to(device, non_blocking) for role, tokens in self.text.items()}
        return Batch(images, slots, text, self.samples, self.totals)

    @property
    def ids(self) -> str:
        """The samples by name, for messages."""
        names = [s.id for s in self.samples]
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


class Term(NamedTuple):
    """One summand of an objective: its sum over this micro-batch and its weight in the total.

    The trainer divides `sum` by the count of the same name over the whole effective batch.
    """

    sum: Tensor
    weight: float = 1.0


def _to(value: Tensor | None, device: torch.device, non_blocking: bool) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=non_blocking)

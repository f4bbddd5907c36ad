"""Processors: samples to batches, for the parts of one model.

Everything that tokenises lives here. A row of several samples that look at the same image holds
the image once, as a shared prefix; each sample is a segment that sees the prefix and itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from triptych.data.templates import IMAGE_MARK, Rendered, render, render_prompt
from triptych.data.transforms import ImageTransform
from triptych.models.fusion import IMAGE
from triptych.types import (
    IGNORE,
    PAD,
    SHARED,
    Batch,
    DataError,
    ImageFeatures,
    ImageRef,
    Images,
    Sample,
    Tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from triptych.data.pixels import PixelCache

Features = Callable[[list[ImageRef]], ImageFeatures]


@dataclass
class Encoded:
    """Token ids of one sample: the part other samples may share, and its own."""

    prefix: list[int]  # up to the end of the leading images
    ids: list[int]
    labels: list[int]
    prefix_images: int  # how many of the sample's images stand in the prefix
    images: int  # how many stand in the row at all

    def __len__(self) -> int:
        return len(self.prefix) + len(self.ids)


class ImageLoader:
    """The distinct images of a batch: decoded, or read from the cache of a frozen encoder."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self.cached: Features | None = None
        self.pixels: PixelCache | None = None

    def __call__(self, samples: Sequence[Sample]) -> tuple[Images | None, dict[str, int]]:
        """The batch's images and where each key stands among them."""
        first: dict[str, tuple[ImageRef, Sample]] = {}
        for sample in samples:
            for ref in sample.images:
                first.setdefault(ref.key, (ref, sample))
        index = {key: i for i, key in enumerate(first)}
        if not index:
            return None, index
        if self.cached is not None:
            features = self.cached([ref for ref, _ in first.values()])
            return Images(list(index), features=features), index
        if self.pixels is not None and all(key in self.pixels for key in index):
            return Images(list(index), pixels=self.pixels(list(index))), index
        pixels = torch.stack([self._decode(ref, sample) for ref, sample in first.values()])
        return Images(list(index), pixels=pixels), index

    def _decode(self, ref: ImageRef, sample: Sample) -> Tensor:
        try:
            return self.transform.read(ref)
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error


@dataclass
class ChatProcessor:
    """Dialogues to language rows, for models that write their answers.

    placeholders: ids an image takes in a row. max_length: tokens of a row; a longer sample is cut
    at its end, never inside an image.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageLoader
    placeholders: int
    max_length: int = 2048
    _cache: dict[tuple, Encoded] = field(default_factory=dict, repr=False)

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """A training batch: each row's samples packed behind their shared image."""
        return self._batch([[(sample, self.encode(sample)) for sample in row] for row in rows])

    def candidates(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """As `rows`, each of one prompt with several last turns: what they begin with is read once.

        Labels of the shared tokens go with them, so that only the last turn can be scored.
        """
        encoded = [[(sample, self.encode(sample)) for sample in row] for row in rows]
        return self._batch([_behind_prompt(row, self.placeholders) for row in encoded])

    def _batch(self, rows: Sequence[list[tuple[Sample, Encoded]]]) -> Batch:
        packed = [part for row in rows for part in self._pack(row)]
        samples = [sample for row in packed for sample, _ in row]
        images, index = self.images(samples)
        return Batch(images, _slots(packed, index), {"language": self._tokens(packed)}, samples)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch with one row a sample, labels on what the assistant says."""
        return self.rows([[sample] for sample in samples])

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Left-padded rows that end where the assistant is to speak, one a sample.

        A row is [padding, leading images, padding, the sample's own words], so that rows over the
        same images begin alike and the model can read that beginning once.
        """
        encoded = [self._encode_prompt(sample) for sample in samples]
        shared = max(len(e.prefix) for e in encoded)
        width = shared + max(len(e.ids) for e in encoded)
        ids = torch.full((len(encoded), width), self.tokenizer.pad_token_id)
        segments = torch.full_like(ids, PAD)
        for row, e in enumerate(encoded):
            for segment, end, part in ((SHARED, shared, e.prefix), (1, width, e.ids)):
                ids[row, end - len(part) : end] = torch.tensor(part, dtype=torch.long)
                segments[row, end - len(part) : end] = segment
        positions = ((segments != PAD).cumsum(1) - 1).clamp_min(0)
        images, index = self.images(samples)
        slots = _slots([[pair] for pair in zip(samples, encoded, strict=True)], index)
        return Batch(images, slots, {"language": Tokens(ids, positions, segments)}, list(samples))

    def decode(self, ids: Tensor) -> list[str]:
        """(B,T) generated ids as text without special tokens."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def encode(self, sample: Sample) -> Encoded:
        """Ids and labels of a sample; remembered, since an epoch asks again."""
        rule = (self.tokenizer.chat_template, self.placeholders, self.max_length)
        key = (sample.id, sample.text, hash(rule))  # ids repeat between sources
        known = self._cache.get(key)
        if known is not None:
            return known
        try:
            encoded = self._encode(sample, render(sample.messages, self.tokenizer))
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error
        if all(label == IGNORE for label in encoded.labels):
            raise DataError(
                f"sample '{sample.id}' has nothing to predict: no assistant words within its first "
                f"{self.max_length} tokens; drop it or raise data.max_length."
            )
        if len(self._cache) < 500_000:
            self._cache[key] = encoded
        return encoded

    def _encode_prompt(self, sample: Sample) -> Encoded:
        text = render_prompt(sample.prompt, self.tokenizer)
        return self._encode(sample, Rendered(text, []))

    def _encode(self, sample: Sample, rendered: Rendered) -> Encoded:
        text, spans = rendered
        pieces = text.split(IMAGE_MARK)
        if len(pieces) - 1 != len(sample.images):
            raise DataError(
                f"the dialogue writes {len(pieces) - 1} images and the sample brings "
                f"{len(sample.images)}; give each image one place."
            )
        leading = _leading_images(sample)
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []  # where each image's placeholders begin
        at, cut = 0, 0  # characters read; tokens of the prefix
        for i, piece in enumerate(pieces):
            if i:
                starts.append(len(ids))
                ids += [IMAGE] * self.placeholders
                labels += [IGNORE] * self.placeholders
                at += 1
                cut = len(ids) if i == leading else cut
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            labels += [
                token if _inside(at + start, at + end, spans) else IGNORE
                for token, (start, end) in zip(
                    encoded["input_ids"], encoded["offset_mapping"], strict=True
                )
            ]
            at += len(piece)
        keep = self._whole(len(ids), starts)
        if keep < cut or (keep == 0 and ids):
            raise DataError(
                f"its images alone take more than data.max_length={self.max_length} tokens; raise "
                "data.max_length or give fewer images."
            )
        kept = sum(s < keep for s in starts)
        return Encoded(ids[:cut], ids[cut:keep], labels[cut:keep], leading, kept)

    def _whole(self, length: int, starts: list[int]) -> int:
        """Tokens kept of a sample: at most max_length, and no part of an image."""
        keep = min(length, self.max_length)
        for start in starts:
            if start < keep < start + self.placeholders:
                keep = start
        return keep

    def _pack(self, row: list[tuple[Sample, Encoded]]) -> list[list[tuple[Sample, Encoded]]]:
        """Split samples into rows whose prefixes are equal and which keep within max_length."""
        rows: list[list[tuple[Sample, Encoded]]] = []
        length = 0
        for sample, encoded in row:
            same = rows and _shares(rows[-1][0], (sample, encoded))
            if not same or length + len(encoded.ids) > self.max_length:
                rows.append([])
                length = len(encoded.prefix)
            rows[-1].append((sample, encoded))
            length += len(encoded.ids)
        return rows

    def _tokens(self, packed: list[list[tuple[Sample, Encoded]]]) -> Tokens:
        lengths = [len(row[0][1].prefix) + sum(len(e.ids) for _, e in row) for row in packed]
        shape = (len(packed), max(lengths))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels, segments = torch.full(shape, IGNORE), torch.full(shape, PAD)
        positions = torch.zeros(shape, dtype=torch.long)
        for b, row in enumerate(packed):
            shared = row[0][1].prefix
            at = len(shared)
            ids[b, :at] = torch.tensor(shared, dtype=torch.long)
            segments[b, :at] = SHARED
            positions[b, :at] = torch.arange(at)
            for s, (_, encoded) in enumerate(row, start=1):
                here = slice(at, at + len(encoded.ids))
                ids[b, here] = torch.tensor(encoded.ids)
                labels[b, here] = torch.tensor(encoded.labels)
                segments[b, here] = s
                positions[b, here] = torch.arange(len(shared), len(encoded))
                at = here.stop
        return Tokens(ids, positions, segments, labels)


@dataclass
class CaptionProcessor:
    """Image-caption pairs to one row of text each, for models that compare the two."""

    packs: ClassVar[bool] = False  # what is said of one image goes into different batches
    encode: Callable[[list[str], int], Tokens]
    images: ImageLoader
    max_length: int = 2048  # the text encoder's own limit holds beside it

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """A batch of pairs; each sample has exactly one image."""
        return self.collate([sample for row in rows for sample in row])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        for sample in samples:
            if len(sample.images) != 1:
                raise DataError(
                    f"sample '{sample.id}' has {len(sample.images)} images; contrastive training "
                    "needs exactly one image and its caption."
                )
        images, index = self.images(samples)
        slots = torch.tensor([[index[s.images[0].key], b, 1] for b, s in enumerate(samples)])
        text = self.encode([s.text for s in samples], self.max_length)
        return Batch(images, slots, {"text": text}, list(samples))


def _leading_images(sample: Sample) -> int:
    """Images before the first words of the first turn: they may be shared by a row."""
    content: Any = sample.messages[0]["content"] if sample.messages else []
    count = 0
    for part in content if isinstance(content, list) else []:
        if part["type"] != "image":
            break
        count += 1
    return count


def _inside(start: int, end: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a token's characters lie in a span; a token that begins before it does not."""
    return any(a <= start and end <= b and start < end for a, b in spans)


def _shares(one: tuple[Sample, Encoded], other: tuple[Sample, Encoded]) -> bool:
    """Whether two samples may stand in one row: same prefix tokens over the same images."""
    (a, x), (b, y) = one, other
    keys = [ref.key for ref in a.images[: x.prefix_images]]
    return x.prefix == y.prefix and keys == [ref.key for ref in b.images[: y.prefix_images]]


def _behind_prompt(
    row: list[tuple[Sample, Encoded]], placeholders: int
) -> list[tuple[Sample, Encoded]]:
    """The row with all tokens in front of its answers, as far as they are equal, in the prefix."""
    if len(row) < 2 or not all(_shares(row[0], other) for other in row):
        return row
    columns = zip(*(e.ids[: _answer_start(e)] for _, e in row), strict=False)
    shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
    images = row[0][1].prefix_images + shared.count(IMAGE) // max(1, placeholders)
    return [
        (
            sample,
            replace(
                e,
                prefix=e.prefix + shared,
                ids=e.ids[len(shared) :],
                labels=e.labels[len(shared) :],
                prefix_images=images,
            ),
        )
        for sample, e in row
    ]


def _answer_start(encoded: Encoded) -> int:
    """Where the last run of labels begins among the sample's own tokens."""
    labelled = [label != IGNORE for label in encoded.labels]
    end = len(labelled) - labelled[::-1].index(True)
    start = labelled[:end][::-1].index(False) if False in labelled[:end] else end
    return end - start


def _slots(packed: list[list[tuple[Sample, Encoded]]], index: dict[str, int]) -> Tensor | None:
    """(S,3) image, row and segment of every place an image is written, in reading order."""
    slots = []
    for b, row in enumerate(packed):
        sample, encoded = row[0]
        slots += [[index[r.key], b, SHARED] for r in sample.images[: encoded.prefix_images]]
        for s, (sample, encoded) in enumerate(row, start=1):
            own = sample.images[encoded.prefix_images : encoded.images]
            slots += [[index[ref.key], b, s] for ref in own]
    return torch.tensor(slots) if slots else None

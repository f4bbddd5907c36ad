"""Which samples run together, and which stand for all: both by image, both deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from triptych.models.api_price import text_tokens
from triptych.types import Sample

ROW_TOKENS = 512  # a batch of rows no longer than this is as large as it may be


def clusters_of(samples: Sequence[Sample]) -> list[str]:
    """The unit of independent sampling of each sample; a sample without one is its own."""
    known = getattr(samples, "clusters", None)  # a reader knows without building its samples
    if known is not None:
        return list(known)
    return [sample.cluster or sample.id for sample in samples]


def plan(
    samples: Sequence[Sample], batch_size: int, tokens: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices of batches of at most `batch_size` rows and `batch_size` x 512 tokens, padding
    counted; no image is in two of them.

    So each image is encoded once at any batch size, and long rows run in smaller batches. The
    longest come first and rows of like length run together, which saves padding. An image whose
    rows do not fit is a batch alone, which the predictor runs in `pieces`. tokens: of each row,
    by default its text alone. The plan depends on nothing but its arguments.
    """
    sizes = [row_tokens(sample) for sample in samples] if tokens is None else tokens
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        rows.setdefault(tuple(image.key for image in sample.images), []).append(index)
    alone = [[index] for index in rows.pop((), [])]  # text-only rows share nothing
    groups = [(max(sizes[i] for i in group), group) for group in [*rows.values(), *alone]]
    batch: list[int] = []
    longest = 0  # row of the batch: its first group's
    for size, group in sorted(groups, key=lambda pair: -pair[0]):
        if batch and len(batch) + len(group) > most_rows(batch_size, longest):
            yield batch
            batch = []
        longest = longest if batch else size
        batch = batch + group
    if batch:
        yield batch


def pieces(
    samples: Sequence[Sample], batch_size: int, tokens: Sequence[int]
) -> Iterator[list[int]]:
    """The batches of `plan`, with those that one image overfills cut to what fits."""
    for batch in plan(samples, batch_size, tokens):
        size = most_rows(batch_size, max(tokens[i] for i in batch))
        yield from (batch[at : at + size] for at in range(0, len(batch), size))


def row_tokens(sample: Sample, image_tokens: int = 0, candidates: Sequence[str] = ()) -> int:
    """About the tokens of a row: its images, and its prompt once, or before every candidate.

    No tokenizer is asked; few need more than this.
    """
    parts = (p for m in sample.prompt for p in m["content"] if p["type"] == "text")
    prompt = sum(text_tokens(part["text"]) for part in parts)
    text = sum(prompt + text_tokens(candidate) for candidate in candidates) or prompt
    return len(sample.images) * image_tokens + text


def most_rows(batch_size: int, tokens: int) -> int:
    """Rows of a batch whose longest has so many tokens; one row runs however long it is."""
    return max(1, min(batch_size, batch_size * ROW_TOKENS // max(1, tokens)))


def image_subset(clusters: Sequence[str], size: int, seed: int) -> list[int]:
    """Indices of exactly min(size, all) samples of randomly drawn images, in the given order.

    Images are taken whole, one after the other, and only the last is cut to meet the number: few
    images to encode, and no hash that could differ between machines.
    """
    members: dict[str, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    groups = list(members.values())
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))
    return sorted([index for g in order for index in groups[g]][:size])

"""Which samples run together, and which stand for all: both by image, both deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from triptych.types import Sample


def clusters_of(samples: Sequence[Sample]) -> list[str]:
    """The unit of independent sampling of each sample; a sample without one is its own."""
    known = getattr(samples, "clusters", None)  # a reader knows without building its samples
    if known is not None:
        return list(known)
    return [sample.cluster or sample.id for sample in samples]


def plan(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of batches of about `batch_size` rows; no image is in two of them.

    So each image is encoded once at any batch size. An image with more rows than fit is a batch
    alone, which the predictor runs in pieces. Images keep the order in which they first appear:
    the plan depends on nothing but the samples and the size.
    """
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        rows.setdefault(tuple(image.key for image in sample.images), []).append(index)
    alone = [[index] for index in rows.pop((), [])]  # text-only rows share nothing
    batch: list[int] = []
    for group in [*rows.values(), *alone]:
        if batch and len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


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

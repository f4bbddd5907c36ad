"""The two baselines that stand beside every number, never mixed up.

prior: the best guess from the question alone, counted on the training split.
blind: the same model with the images permuted across the samples.
A model uses its images when the lower bound of its score exceeds the upper bounds of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from triptych.types import ImageRef, Sample


def question_of(sample: Sample) -> str:
    """The words of the last user turn."""
    turns = [m for m in sample.messages if m["role"] == "user"]
    parts = turns[-1]["content"] if turns else []
    return " ".join(part["text"] for part in parts if part["type"] == "text")


class Prior:
    """The most frequent answer to each question text, else the most frequent of all.

    Ties go to the answer seen first, so the baseline is one number.
    """

    def __init__(self, train: Sequence[Sample]) -> None:
        answers: dict[str, Counter[str]] = {}
        every: Counter[str] = Counter()
        # a reader of files need not open pictures to be counted
        samples = train.without_images() if hasattr(train, "without_images") else train
        for sample in samples:
            answers.setdefault(question_of(sample), Counter())[str(sample.target)] += 1
            every[str(sample.target)] += 1
        self._guess = {question: _most_frequent(count) for question, count in answers.items()}
        self._fallback = _most_frequent(every)

    def guess(self, sample: Sample) -> str:
        """An answer that has seen the question and no image."""
        return self._guess.get(question_of(sample), self._fallback)


def permute_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The samples with every distinct image replaced by another one of theirs.

    A seeded derangement over the distinct images, so no image stays and questions that shared an
    image share one again. Empty if there are fewer than two images: nothing could be permuted.
    """
    images: dict[str, ImageRef] = {}
    for sample in samples:
        images.update((image.key, image) for image in sample.images)
    if len(images) < 2:
        return []
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
    refs = list(images.values())
    cycle = [refs[i] for i in order]  # one cycle through all images has no fixed point
    other = {a.key: b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)}
    tags = {image.key: s.tags for s in samples for image in s.images[:1]}
    return [_with_images(s, [other[image.key] for image in s.images], tags) for s in samples]


def _with_images(sample: Sample, images: list[ImageRef], tags: dict[str, list[str]]) -> Sample:
    """Object tags were read off the image, so they go where it goes."""
    seen = tags.get(images[0].key, []) if images and sample.tags else sample.tags
    return replace(sample, images=images, tags=seen)


def _most_frequent(counts: Counter[str]) -> str:
    return counts.most_common(1)[0][0] if counts else ""  # equal counts: in order of insertion

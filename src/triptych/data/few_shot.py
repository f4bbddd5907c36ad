"""Interleaved dialogues: a question behind solved ones on other images (Flamingo's few shots)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from triptych.types import DataError, Sample


class FewShot(Sequence[Sample]):
    """Each sample with k solved samples of `support` in front, each with its own image.

    shots: the values k is drawn from, by the sample's index and `seed` alone. support: null = the
    samples themselves (for training); solved samples never show the image that is asked about.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        shots: Sequence[int] = (4,),
        support: Sequence[Sample] | None = None,
        seed: int = 0,
    ) -> None:
        if not shots or min(shots) < 0:
            raise DataError(f"few_shot.shots {list(shots)} must be numbers from 0 on.")
        self.samples, self.shots, self.seed = samples, tuple(shots), seed
        self.support = samples if support is None else support

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = range(len(self))[index]
        sample = self.samples[index]
        random = np.random.default_rng([self.seed, index])
        wanted = int(random.choice(self.shots))
        shown = self._draw(random, sample, wanted)
        if not shown:
            return sample
        messages = [m for s in shown for m in s.messages] + sample.messages
        images = [i for s in shown for i in s.images] + sample.images
        return replace(sample, messages=messages, images=images)  # the id joins numbers of shots

    @cached_property
    def clusters(self) -> list[str]:
        """The image of each sample, which rows are planned by."""
        known = getattr(self.samples, "clusters", None)
        return known if known is not None else [s.cluster for s in self.samples]

    def _draw(self, random: np.random.Generator, sample: Sample, wanted: int) -> list[Sample]:
        seen = {ref.key for ref in sample.images}
        shown: list[Sample] = []
        for _ in range(50 * wanted):
            if len(shown) == wanted:
                break
            other = self.support[int(random.integers(len(self.support)))]
            keys = {ref.key for ref in other.images}
            if not keys & seen:
                seen |= keys
                shown.append(other)
        if len(shown) < wanted:
            raise DataError(
                f"sample '{sample.id}' finds no {wanted} solved samples on other images; give a "
                "larger few_shot.support or fewer shots."
            )
        return shown

"""A mixture: several data sets read as one, in stated shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from triptych.types import DataError, Sample

RULES = {"size": float, "root": math.sqrt, "equal": lambda size: 1.0}


class Mixture(Sequence[Sample]):
    """`size` samples of several readers; a sample's `source` is its data set's name here.

    sets: readers by name, the names that `objective.weights` takes. shares: "size" (in proportion
    to the sets' sizes), "root" (to their square roots: InstructBLIP, arXiv 2305.06500, section
    2.3), "equal", or a number for every name. size: samples of an epoch (null = all sets
    together); shares are kept exactly, but for the fraction of a sample.

    A set is read in passes, each in an order of its own drawn from `seed`, so that no sample comes
    twice before all came once. An epoch is fixed: what it leaves of a large set comes with a
    larger `size` (steps x batch size makes the whole run one epoch), not with a second epoch.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Sample]],
        shares: str | Mapping[str, float] = "size",
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not sets:
            raise DataError(
                "the mixture has no data set; add data.train.sets.NAME={_target_: ...}."
            )
        empty = [name for name, reader in sets.items() if not len(reader)]
        if empty:
            raise DataError(f"data set '{empty[0]}' of the mixture is empty; check its path.")
        total = sum(map(len, sets.values())) if size is None else size
        if total < len(sets):
            raise DataError(f"data.train.size {total} is less than a sample of {len(sets)} sets.")
        self.sets, self.names, self.seed = dict(sets), list(sets), seed
        weights = _weights(shares, {name: len(reader) for name, reader in sets.items()})
        self.counts = dict(zip(sets, divide(total, list(weights.values())), strict=True))
        self._ends = np.cumsum(list(self.counts.values()))  # where each set's samples end
        self._order = {name: self._passes(number) for number, name in enumerate(self.sets)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        name, place = self._place(range(len(self))[index])
        sample = self.sets[name][int(self._order[name][place])]
        # ids may repeat between sets, and messages shall say which one is meant
        return replace(sample, source=name, id=f"{name}/{sample.id}")

    @cached_property
    def clusters(self) -> list[str]:
        """The image of every sample, told apart by data set, without opening any."""
        found: list[str] = []
        for name, reader in self.sets.items():
            known = getattr(reader, "clusters", None)
            known = known if known is not None else [s.cluster for s in reader]
            found += [f"{name}/{known[i] or f'#{i}'}" for i in self._order[name]]
        return found

    @cached_property
    def passes(self) -> list[int]:
        """How often the set of every sample was read before; a row holds samples of one pass."""
        return [
            place // len(self.sets[name])
            for name, count in self.counts.items()
            for place in range(count)
        ]

    def _passes(self, number: int) -> np.ndarray:
        """Which samples of a set are read, pass after pass."""
        name = self.names[number]
        length, count = len(self.sets[name]), self.counts[name]
        orders = [
            np.random.default_rng([self.seed, number, turn]).permutation(length)
            for turn in range(-(-count // length))
        ]
        return np.concatenate(orders)[:count]

    def _place(self, index: int) -> tuple[str, int]:
        """The data set of a sample, and how many of that set stand before it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        name = self.names[number]
        return name, index - int(self._ends[number]) + self.counts[name]


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, each less than 1 from its share (largest remainders)."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(x) for x in exact]
    rest = total - sum(counts)
    nearest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # ties: first set
    for i in nearest[:rest]:
        counts[i] += 1
    return counts


def _weights(shares: str | Mapping[str, float], sizes: dict[str, int]) -> dict[str, float]:
    names = ", ".join(sizes)
    if isinstance(shares, str):
        if shares not in RULES:
            raise DataError(
                f"data.train.shares is '{shares}'; it takes {', '.join(RULES)}, or a number for "
                f"each of {names}."
            )
        return {name: RULES[shares](size) for name, size in sizes.items()}
    odd = [name for name in shares if name not in sizes]
    lacking = [name for name in sizes if name not in shares]
    if odd or lacking:
        what = f"names '{odd[0]}', which is no set" if odd else f"has no number for '{lacking[0]}'"
        raise DataError(f"data.train.shares {what} of the mixture; its sets are {names}.")
    for name, share in shares.items():
        if not (isinstance(share, int | float) and 0 < share < math.inf):
            raise DataError(
                f"data.train.shares.{name} is {share}; give a number above 0, or leave the set out."
            )
    return {name: float(shares[name]) for name in sizes}

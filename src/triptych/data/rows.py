"""Which samples share a row, and in which order the rows of an epoch are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler

from triptych.types import DataError, Sample

Row = tuple[int, ...]


class Rows(Dataset):
    """A reader addressed by rows: `rows[(3, 4, 5)]` is a list of three samples."""

    def __init__(self, reader: Sequence[Sample]) -> None:
        self.reader = reader

    def __getitem__(self, row: Row) -> list[Sample]:
        return [self.reader[i] for i in row]

    def __len__(self) -> int:
        return len(self.reader)


class RowPlan:
    """Samples of one image stand together, at most `samples_per_row` of them.

    draw: samples taken of each image an epoch, chosen anew each time (null = all). Contrastive
    training draws one caption of an image, so that no batch holds two that are both right.
    """

    def __init__(
        self, reader: Sequence[Sample], samples_per_row: int, draw: int | None, seed: int
    ) -> None:
        groups: dict[tuple[str, int], list[int]] = {}
        clusters = getattr(reader, "clusters", None)
        passes = getattr(reader, "passes", None)  # of a mixture, which may read a set again
        if passes is not None and draw is not None:
            raise DataError(
                "data.draw takes some samples of each image, which would undo the shares of a "
                "mixture; leave it out."
            )
        for i in range(len(reader)):
            cluster = clusters[i] if clusters is not None else reader[i].cluster
            key = self._key(cluster or f"#{i}", 0 if passes is None else passes[i])
            groups.setdefault(key, []).append(i)
        self.groups = list(groups.values())
        self.samples_per_row, self.draw, self.seed = samples_per_row, draw, seed

    def __len__(self) -> int:
        """Rows of an epoch."""
        sizes = [min(len(g), self.draw or len(g)) for g in self.groups]
        return sum(-(-size // self.samples_per_row) for size in sizes)

    def rows(self, epoch: int) -> list[Row]:
        """The rows of an epoch in reading order: a function of the seed and the epoch alone."""
        random = np.random.default_rng([self.seed, epoch])
        rows = [row for rows in self._grouped(random) for row in rows]
        return [rows[i] for i in random.permutation(len(rows))]

    def batches(self, epoch: int, size: int, count: int) -> list[list[Row]]:
        """The first `count` batches of an epoch, of `size` rows; the last may be smaller."""
        rows = self.rows(epoch)
        return [rows[i * size : (i + 1) * size] for i in range(count)]

    def _key(self, image: str, turn: int) -> tuple[str, int]:
        """What puts samples together: one image, read in one pass over its data set."""
        return image, turn

    def _grouped(self, random: np.random.Generator) -> list[list[Row]]:
        """The drawn rows of every image."""
        grouped, step = [], self.samples_per_row
        for group in self.groups:
            drawn = group
            if self.draw is not None and self.draw < len(group):
                drawn = [group[i] for i in random.permutation(len(group))[: self.draw]]
            grouped.append([tuple(drawn[i : i + step]) for i in range(0, len(drawn), step)])
        return grouped


class SpreadPlan(RowPlan):
    """Rows of one image stand in different batches: what is said of it is never a wrong pair.

    Rows are dealt to the batches like cards, image after image, so that sizes differ by one at
    most. An image with more rows than there are batches leaves the rest for another epoch.
    """

    def _key(self, image: str, turn: int) -> tuple[str, int]:
        return image, 0  # read again, it is still the same image

    def batches(self, epoch: int, size: int, count: int) -> list[list[Row]]:
        random = np.random.default_rng([self.seed, epoch])
        grouped = self._grouped(random)
        dealt: list[Row] = []
        for g in random.permutation(len(grouped)):
            rows = grouped[g]
            dealt += [rows[i] for i in random.permutation(len(rows))[:count]]
        order = random.permutation(count)  # neighbours in `dealt` do not become neighbours in time
        return [_shuffled(dealt[i::count], random)[:size] for i in order]


class RowSampler(Sampler):
    """Batches of rows for one rank. `skip` batches of the first epoch were read before a resume."""

    def __init__(self, plan: RowPlan, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.plan, self.batch_size, self.rank, self.world = plan, batch_size, rank, world
        self.epoch = self.skip = 0
        self.sampler = self  # Lightning calls set_epoch on `batch_sampler.sampler`

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        step = self.batch_size * self.world
        full, rest = divmod(len(self.plan), step)
        # ranks take the same number of batches; alone, the last one may be smaller
        return max(1, full + (1 if rest and self.world == 1 else 0))

    def __iter__(self) -> Iterator[list[Row]]:
        step = self.batch_size * self.world
        for rows in self.plan.batches(self.epoch, step, len(self))[self.skip :]:
            share = len(rows) // self.world  # ranks take the same number of rows
            yield rows[self.rank * share : (self.rank + 1) * share]


def _shuffled(rows: list[Row], random: np.random.Generator) -> list[Row]:
    return [rows[i] for i in random.permutation(len(rows))]

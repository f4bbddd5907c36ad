"""WebDataset shards as an endless stream: sharded over ranks and workers, resumed to the sample.

`datasets` splits the shards and remembers the place in them. Shuffling is exact on resume: the
order of shards is drawn for every pass, and samples are permuted within blocks whose start is
remembered, so that a block is read again and continued.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from triptych.data.datamodule import Windows
from triptych.data.images import open_image
from triptych.data.pairs import SUFFIXES
from triptych.distributed import rank, world
from triptych.objectives.base import Objective
from triptych.types import (
    Batch,
    DataError,
    ImageRef,
    Sample,
    TriptychError,
    assistant,
    content_key,
    user,
)

MAX_IMAGE, MAX_TEXT = 1 << 27, 1 << 20  # bytes of one member of a shard
KEEP = 256  # positions remembered: more than a window and its prefetching


class StreamModule(pl.LightningDataModule):
    """Image-caption pairs of tar shards, in the place of a DataModule.

    shards: paths, URLs or a pattern such as DIR/{0000..0099}.tar or DIR/*.tar. A sample is the
    members of one name: an image and a .txt, or a .json with `caption`. buffer: samples of a block
    that are permuted together (1 = the order of the shard). The stream has no end:
    trainer.max_steps must be set.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        processor: Any,
        objective: Objective,
        batch_size: int = 256,
        buffer: int = 2048,
        caption: str = "caption",
        max_length: int = 2048,
        workers: int = 0,
        seed: int = 0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.shards = find_shards(shards)
        self.processor, self.objective = processor, objective
        processor.max_length = max_length
        self.batch_size, self.buffer, self.caption = batch_size, max(1, buffer), caption
        self.workers, self.seed, self.accumulate = workers, seed, accumulate
        self._resume: dict[str, Any] = {}
        self._tracked: _Tracked | None = None

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.max_steps < 0:
            raise TriptychError(
                "a stream of shards has no end, so an epoch cannot be counted; set "
                "trainer.max_steps."
            )

    def first_rows(self, count: int) -> list[list[Sample]]:
        """The first samples of the first shard, a row each."""
        rows = islice(read_shards(self.shards[:1]), count)
        return [[_sample(row, self.caption)] for row in rows]

    def references(self) -> None:
        """No list of images: features of a frozen encoder are computed as the stream comes."""

    def train_dataloader(self) -> Windows:
        known = self._resume.get("workers", {})
        if known and self._resume["count"] != self.workers:
            raise TriptychError(
                f"the run was started with data.workers={self._resume['count']}, which decides the "
                f"order of samples; continue it with that number, not {self.workers}."
            )
        stream = Stream(self, rank(), world(), known, self._resume.get("last", -1))
        loader = DataLoader(
            stream, batch_size=None, num_workers=self.workers, collate_fn=_same, pin_memory=False
        )
        self._tracked = _Tracked(loader, self._resume.get("batch", 0), known)
        return Windows(self._tracked, self.objective, self.accumulate)

    def state_dict(self) -> dict[str, Any]:
        """The place of every worker behind the last batch that was used, in plain types."""
        used = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        last, places = self._tracked.places.get(used - 1, (-1, {}))
        return {"batch": used, "last": last, "count": self.workers, "workers": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state


class Stream(IterableDataset):
    """(batch, worker, place behind it), without end."""

    def __init__(
        self, module: StreamModule, rank: int, world: int, places: dict[str, Any], last: int
    ) -> None:
        self.shards, self.seed, self.caption = module.shards, module.seed, module.caption
        self.batch_size, self.buffer = module.batch_size, module.buffer
        self.collate: Callable[[list[Sample]], Batch] = module.processor.collate
        self.rank, self.world, self.places, self.last = rank, world, places, last

    def __iter__(self) -> Iterator[tuple[Batch, int, dict] | None]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        if worker <= self.last and info is not None:
            yield None  # workers take turns: it is not this one's
        batch: list[Sample] = []
        for sample, place in self._samples(worker, self.places.get(str(worker))):
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield self.collate(batch), worker, place
                batch = []

    def _samples(self, worker: int, place: dict | None) -> Iterator[tuple[Sample, dict]]:
        """Samples, each with the place behind it: the pass, its block, and how far into that."""
        place = place or {"epoch": 0, "block": 0, "used": 0, "start": None}
        while True:
            rows = self._pass(place["epoch"])
            if place["start"] is not None:
                rows.load_state_dict(place["start"])
            found = place["start"] is not None
            reader, start = iter(rows), rows.state_dict()
            while block := list(islice(reader, self.buffer)):
                found = True
                draw = [self.seed, place["epoch"], place["block"], self.rank, worker]
                order = np.random.default_rng(draw).permutation(len(block))
                for used in range(place["used"], len(block)):
                    behind = {**place, "used": used + 1, "start": start}
                    yield _sample(block[order[used]], self.caption), behind
                start = rows.state_dict()
                place = {**place, "block": place["block"] + 1, "used": 0}
            if not found:
                return  # more workers than shards
            place = {"epoch": place["epoch"] + 1, "block": 0, "used": 0, "start": None}

    def _pass(self, epoch: int) -> Any:
        """The shards of this rank in the order of this pass; workers split them once more."""
        from datasets import IterableDataset as Streaming
        from datasets.distributed import split_dataset_by_node

        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        shards = [self.shards[i] for i in order]
        rows = Streaming.from_generator(read_shards, gen_kwargs={"shards": shards})
        return split_dataset_by_node(rows, self.rank, self.world)


class _Tracked:
    """A loader that remembers where every worker stood behind each of the latest batches."""

    batch_sampler = None

    def __init__(self, loader: DataLoader, first: int, places: dict[str, Any]) -> None:
        self.loader, self.first = loader, first
        self.places: dict[int, tuple[int, dict[str, Any]]] = {}
        self._now = dict(places)

    def __iter__(self) -> Iterator[Batch]:
        number = self.first
        for item in self.loader:
            if item is None:
                continue
            batch, worker, place = item
            self._now[str(worker)] = place
            self.places[number] = (worker, dict(self._now))
            self.places.pop(number - KEEP, None)
            number += 1
            yield batch
        raise DataError("the shards hold no pair of an image and a caption; check data.path.")


def find_shards(shards: str | Sequence[str]) -> list[str]:
    """The shards of a list, a brace range or a glob pattern, in order."""
    if isinstance(shards, str):
        begin, brace, rest = shards.partition("{")
        numbers, _, end = rest.partition("}")
        if brace and ".." in numbers:
            low, high = numbers.split("..")
            shards = [f"{begin}{i:0{len(low)}d}{end}" for i in range(int(low), int(high) + 1)]
        elif "://" in shards:
            shards = [shards]
        else:
            path = Path(shards)
            shards = sorted(map(str, path.parent.glob(path.name)))
            if not shards:
                raise DataError(f"no shard matches '{path}'; correct data.path.")
    local = [s for s in shards if "://" not in s and not Path(s).is_file()]
    if local:
        raise DataError(f"shard '{local[0]}' does not exist; correct data.path.")
    return list(shards)


def read_shards(shards: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of tar files, read once from front to back and never unpacked to disk."""
    import fsspec

    for shard in shards:
        members: dict[str, bytes] = {}
        key = ""
        try:
            with fsspec.open(shard, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if f"{folder}/{stem}" != key and members:
                        yield {"key": key.lstrip("/"), "shard": shard, "members": members}
                        members = {}
                    key = f"{folder}/{stem}"
                    image = f".{kind.lower()}" in SUFFIXES
                    if member.size > (MAX_IMAGE if image else MAX_TEXT):
                        raise DataError(f"'{member.name}' of shard '{shard}' is too large to read.")
                    members[kind.lower()] = tar.extractfile(member).read()
        except (tarfile.TarError, EOFError) as error:
            raise DataError(
                f"shard '{shard}' is no whole tar file ({error}); fetch it again."
            ) from None
        if members:
            yield {"key": key.lstrip("/"), "shard": shard, "members": members}


def _sample(row: dict[str, Any], caption: str) -> Sample:
    members, name = row["members"], f"{row['shard']}:{row['key']}"
    # the library fills members that other samples have with None
    image = next((v for k, v in members.items() if v is not None and f".{k}" in SUFFIXES), None)
    words = members.get("txt")
    if words is None and members.get("json") is not None:
        content = json.loads(members["json"])
        words = str(content.get(caption, "")).encode() if isinstance(content, dict) else None
    if image is None or not words:
        raise DataError(
            f"sample '{name}' lacks an image or a caption (.txt, or .json '{caption}')."
        )
    ref = ImageRef(content_key(image), partial(_open, image, name), name, drafts=True)
    text = " ".join(words.decode("utf-8", "replace").split())
    messages = [user("", images=1), assistant(text)]
    return Sample(messages, [ref], id=name, cluster=ref.key, source="webdataset")


def _open(data: bytes, name: str, draft: int | None = None) -> Any:
    try:
        return open_image(data, draft=draft)
    except DataError as error:
        raise DataError(f"sample '{name}': {error}") from None


def _same(item: Any) -> Any:
    return item

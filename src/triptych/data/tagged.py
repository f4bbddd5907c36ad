"""Words, object tags and regions in one row, with masked tokens and polluted tags (OSCAR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from triptych.data.instruct import answer, instruction
from triptych.data.processor import ImageLoader
from triptych.models.fusion import IMAGE
from triptych.types import IGNORE, PAD, Batch, DataError, Images, Sample, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TaggedProcessor:
    """A row a sample: [CLS] words [SEP] tags [SEP] regions.

    A caption's words and tags are masked with probability `rate` (80 % mask, 10 % another token,
    10 % itself), and with probability `pollution` its tags are those of another image of the batch
    (Oscar, arXiv 2004.06165, section 3). An answer stands as `blanks` masks behind its question and
    is never polluted, so that its row is the same each time.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageLoader
    placeholders: int
    max_length: int = 70  # words, tags and their marks; regions come on top
    rate: float = 0.15
    pollution: float = 0.5
    blanks: int = 4
    _special: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._special = frozenset(self.tokenizer.all_special_ids)

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return self.collate([sample for row in rows for sample in row])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A training batch; text["match"] holds 1 where a caption's tags are another image's."""
        asked = [bool(instruction(s)) for s in samples]
        if any(asked) != all(asked):
            raise DataError(
                "a batch mixes captions and questions; give them data sets of their own."
            )
        if all(asked):
            rows = [self._question(s, answer(s)) for s in samples]
            return self._batch(samples, rows, {})
        tags, polluted = self._pollute(samples)
        rows = [self._masked(s, t) for s, t in zip(samples, tags, strict=True)]
        flags = torch.tensor(polluted, dtype=torch.long)[:, None]  # (B,1)
        match = Tokens(torch.zeros_like(flags), torch.zeros_like(flags), flags * 0 + 1, flags)
        return self._batch(samples, rows, {"match": match})

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Rows with `blanks` masks where the answer, or a caption's next words, are to stand."""
        return self._batch(samples, [self._question(s, None) for s in samples], {})

    def decode(self, ids: Tensor) -> list[str]:
        """(B,blanks) filled ids as text, up to the first end mark."""
        rows = [row[: row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    @property
    def start(self) -> int:
        """[CLS], or what the tokenizer begins a text with."""
        first = self.tokenizer.cls_token_id
        return self.tokenizer.bos_token_id if first is None else first

    @property
    def end(self) -> int:
        """[SEP], or what the tokenizer ends a text with."""
        last = self.tokenizer.sep_token_id
        return self.tokenizer.eos_token_id if last is None else last

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pollute(self, samples: Sequence[Sample]) -> tuple[list[list[str]], list[bool]]:
        tags, polluted = [], []
        for sample in samples:
            others = [s.tags for s in samples if sorted(s.tags) != sorted(sample.tags)]
            swap = bool(others) and float(torch.rand(())) < self.pollution
            other = int(torch.randint(len(others), ())) if swap else 0
            tags.append(others[other] if swap else sample.tags)
            polluted.append(swap)
        return tags, polluted

    def _masked(self, sample: Sample, tags: list[str]) -> tuple[list[int], list[int], list[int]]:
        """Ids, types and labels of a caption with its tags, some of them masked."""
        ids, types = self._words_and_tags(self._ids(answer(sample)), tags)
        labels = [IGNORE] * len(ids)
        for i, token in enumerate(ids):
            if token in self._special or float(torch.rand(())) >= self.rate:
                continue
            labels[i] = token
            fate = float(torch.rand(()))
            if fate < 0.8:
                ids[i] = self.tokenizer.mask_token_id
            elif fate < 0.9:
                ids[i] = int(torch.randint(len(self.tokenizer), ()))
        return ids, types, labels

    def _question(self, sample: Sample, said: str | None) -> tuple[list[int], list[int], list[int]]:
        """Ids, types and labels of a question with its blanks."""
        blanks = [self.tokenizer.mask_token_id] * self.blanks
        question = self._ids(instruction(sample))
        words = question[: self.max_length - self.blanks - 3] + blanks
        ids, types = self._words_and_tags(words, sample.tags)
        labels = [IGNORE] * len(ids)
        if said is not None:
            gold = self._ids(said)
            if len(gold) > self.blanks:
                raise DataError(
                    f"the answer of sample '{sample.id}' takes {len(gold)} tokens and there are "
                    f"{self.blanks} blanks; raise blanks, or use a model that writes."
                )
            gold += [self.end] * (self.blanks - len(gold))
            at = 1 + len(words) - self.blanks
            labels[at : at + self.blanks] = gold
        return ids, types, labels

    def _words_and_tags(self, words: list[int], tags: list[str]) -> tuple[list[int], list[int]]:
        words = words[: self.max_length - 3]
        named = self._ids(" ".join(tags))[: self.max_length - 3 - len(words)]
        ids = [self.start, *words, self.end, *named, self.end]
        types = [0] * (len(words) + 2) + [1] * (len(named) + 1)
        return ids, types

    def _batch(
        self,
        samples: Sequence[Sample],
        rows: list[tuple[list[int], list[int], list[int]]],
        more: dict[str, Tokens],
    ) -> Batch:
        images, index = self.images(samples)
        for sample in samples:
            if len(sample.images) != 1:
                raise DataError(
                    f"sample '{sample.id}' has {len(sample.images)} images; this model reads "
                    "exactly one image beside its words."
                )
        which = [index[s.images[0].key] for s in samples]
        regions = [self._regions(images, i) for i in which]
        lengths = [len(ids) + r for (ids, _, _), r in zip(rows, regions, strict=True)]
        shape = (len(rows), max(lengths))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels, segments = torch.full(shape, IGNORE), torch.full(shape, PAD)
        types, positions = (
            torch.zeros(shape, dtype=torch.long),
            torch.zeros(shape, dtype=torch.long),
        )
        for b, ((row, kinds, gold), count) in enumerate(zip(rows, regions, strict=True)):
            n = len(row)
            ids[b, :n], types[b, :n], labels[b, :n] = map(torch.tensor, (row, kinds, gold))
            ids[b, n : n + count] = IMAGE
            positions[b, :n] = torch.arange(n)
            segments[b, : n + count] = 1
        slots = torch.tensor([[i, b, 1] for b, i in enumerate(which)])
        language = Tokens(ids, positions, segments, labels, types)
        return Batch(images, slots, {"language": language, **more}, list(samples))

    def _regions(self, images: Images, index: int) -> int:
        """Places image `index` takes: its stored regions, or what the encoder gives any image."""
        counts = images.extra.get("regions") if images.features is None else images.features.counts
        return self.placeholders if counts is None else int(counts[index])

"""Texts of models that compare, match and describe: [CLS] words [SEP], and its two other starts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from triptych.parts.language import load_tokenizer
from triptych.types import IGNORE, PAD, Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairText:
    """The tokenizer side of a part that reads and writes texts about an image.

    A row is a start token, the words and an end token. Which start stands there tells the part
    what to do: `read` for the text alone, `match` beside an image, `write` to describe one (BLIP's
    [CLS], [ENC] and [DEC]; arXiv 2201.12086, section 3.1).
    """

    def set_tokenizer(
        self, source: str | None, starts: dict[str, str] | None, vocabulary: int, length: int
    ) -> None:
        """source: tokenizer folder or hub id; length: most tokens of a row, both ends included."""
        self._source, self._starts = source, dict(starts or {})
        self._vocabulary, self.max_length = vocabulary, length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the start tokens added that it lacks."""
        tokenizer = load_tokenizer(self._source)
        known = tokenizer.get_vocab()
        lacking = sorted({t for t in self._starts.values() if t not in known})
        tokenizer.add_special_tokens({"additional_special_tokens": lacking})
        if len(tokenizer) > self._vocabulary:
            raise TriptychError(
                f"the tokenizer '{self._source}' has {len(tokenizer)} tokens with its start tokens "
                f"and the text part's vocab_size is {self._vocabulary}; make it at least as large."
            )
        return tokenizer

    def start_id(self, use: str) -> int:
        """Id of the token a row begins with, for `read`, `match` or `write`."""
        if use in self._starts:
            return self.tokenizer.convert_tokens_to_ids(self._starts[use])
        first = self.tokenizer.cls_token_id
        return self.tokenizer.bos_token_id if first is None else first

    @property
    def end_id(self) -> int:
        last = self.tokenizer.sep_token_id
        return self.tokenizer.eos_token_id if last is None else last

    def encode(self, texts: list[str], max_length: int | None = None, use: str = "read") -> Tokens:
        """Texts as rows padded on the right to the longest; all but the start are labels."""
        most = min(self.max_length, max_length or self.max_length)
        start, end = self.start_id(use), self.end_id
        return framed_rows(self.tokenizer, texts, start, end, most)

    def prompt(self, texts: list[str]) -> Tokens:
        """Beginnings to write on from, padded on the left: a start and the words, no end."""
        words = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [[self.start_id("write"), *w[: self.max_length - 2]] for w in words]
        shape = (len(rows), max(map(len, rows)))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        segments = torch.full(shape, PAD)
        for b, row in enumerate(rows):
            ids[b, shape[1] - len(row) :] = torch.tensor(row)
            segments[b, shape[1] - len(row) :] = 1
        positions = ((segments != PAD).cumsum(1) - 1).clamp_min(0)
        return Tokens(ids, positions, segments)


def framed_rows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], start: int, end: int, most: int
) -> Tokens:
    """Rows of at most `most` tokens, start, words and end, padded on the right.

    All but the start are labels: what a decoder writes.
    """
    words = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[start, *w[: most - 2], end] for w in words]
    shape = (len(rows), max(map(len, rows)))
    ids = torch.full(shape, tokenizer.pad_token_id)
    labels, segments = torch.full(shape, IGNORE), torch.full(shape, PAD)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        labels[b, 1 : len(row)] = torch.tensor(row[1:])
        segments[b, : len(row)] = 1
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return Tokens(ids, positions, segments, labels)

"""Dialogues for connectors that read the instruction and for models with a decoder of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from triptych.data.processor import ChatProcessor, Encoded
from triptych.parts.pair_text import framed_rows
from triptych.types import Batch, DataError, Sample, Tokens


@dataclass
class InstructProcessor(ChatProcessor):
    """A ChatProcessor whose batches also hold text["text"], the instruction of every slot.

    Visual tokens depend on the question here, so that rows never share an image. read: the
    connector's own tokenisation.
    """

    read: Callable[[list[str]], Tokens] = field(kw_only=True)

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        return self._instruct(super().prompts(samples))

    def _batch(self, rows: Sequence[list[tuple[Sample, Encoded]]]) -> Batch:
        return self._instruct(super()._batch(rows))

    def _pack(self, row: list[tuple[Sample, Encoded]]) -> list[list[tuple[Sample, Encoded]]]:
        return [[pair] for pair in row]

    def _instruct(self, batch: Batch) -> Batch:
        if batch.slots is not None:
            rows: list[Any] = batch.slots[:, 1].tolist()
            batch.text["text"] = self.read([instruction(batch.samples[b]) for b in rows])
        return batch


@dataclass
class Seq2SeqProcessor(ChatProcessor):
    """Prompts for the encoder and the last assistant turn for the decoder (FlanT5's prefix LM).

    A row holds one sample. start_id: what the decoder begins with.
    """

    start_id: int = field(kw_only=True)

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        samples = [sample for row in rows for sample in row]
        batch = self.prompts(samples)
        batch.text["decoder"] = self._answers(samples)
        return batch

    def candidates(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return self.rows(rows)  # the prompt is the encoder's, an answer the decoder's

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Rows padded on the right: the encoder counts distances by columns, so none may gape."""
        batch = super().prompts(samples)
        tokens = batch.text["language"]
        order = (~tokens.mask).long().argsort(dim=1, stable=True)  # (B,T) real tokens first
        moved = (x.gather(1, order) for x in (tokens.ids, tokens.positions, tokens.segments))
        batch.text["language"] = Tokens(*moved)
        return batch

    def _answers(self, samples: Sequence[Sample]) -> Tokens:
        """start, the answer's words, the end; all but the start are labels."""
        said, end = [answer(s) for s in samples], self.tokenizer.eos_token_id
        return framed_rows(self.tokenizer, said, self.start_id, end, self.max_length)


@dataclass
class InstructSeq2SeqProcessor(InstructProcessor, Seq2SeqProcessor):
    """Both: InstructBLIP with FlanT5."""


def answer(sample: Sample) -> str:
    """The words of the last turn, which has to be the assistant's."""
    last = sample.messages[-1]
    words = "".join(p["text"] for p in last["content"] if p["type"] == "text")
    if last["role"] != "assistant" or not words:
        raise DataError(
            f"sample '{sample.id}' has nothing to predict: its last turn is no answer; add one."
        )
    return words


def instruction(sample: Sample) -> str:
    """What the user says, all turns together; the same in training and in a prompt."""
    said = (m["content"] for m in sample.messages if m["role"] == "user")
    return " ".join(p["text"] for content in said for p in content if p["type"] == "text")

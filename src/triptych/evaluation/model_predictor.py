"""The predictor of the models built here: what writes answers, and what embeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from triptych.evaluation.planning import pieces, row_tokens
from triptych.evaluation.predictor import Score
from triptych.objectives.tokens import written
from triptych.parts.attention import predecessors
from triptych.types import (
    IGNORE,
    Batch,
    DataError,
    ImageFeatures,
    ImageRef,
    Images,
    Sample,
    Tokens,
    assistant,
)

KEPT_BYTES = 4 << 30  # most bytes of image features kept while embeddings and matches are asked
HEAD_ROWS = 1024  # positions whose logits over the vocabulary exist at a time


class ModelPredictor:
    """Answers and likelihoods of a model that writes, in left-padded batches; vectors of one
    that embeds.

    model: features, forward, generate and `language.logits` as the VLM has them. processor:
    prompts, rows and decode as the ChatProcessor has them. An image is encoded once a call,
    however many rows ask about it; `vision_calls` counts the images really encoded.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        batch_size: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.device = torch.device(device or next(model.parameters()).device)
        self.vision_calls = 0
        self.generated_tokens = 0
        self._kept: dict[str, ImageFeatures] | None = None  # inside `keeping` alone

    @property
    def image_tokens(self) -> int:
        """Tokens of a row that one image takes, as far as the processor knows beforehand."""
        return getattr(self.processor, "placeholders", 0)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model's own methods make possible."""
        language = getattr(self.model, "language", None)
        writes = hasattr(self.model, "generate")
        pairs = hasattr(self.model, "match_logits")  # one text part compares, matches and writes
        reads = not pairs or hasattr(self.model.connector, "question")
        offers = {
            "generate": writes and reads,
            "caption": writes and pairs,
            "match": pairs,
            "loglikelihood": hasattr(language, "logits"),
            "sentences": hasattr(language, "logits") and _reads_on(language),
            "embed": hasattr(self.model, "embed_images"),
            "features": hasattr(self.model, "image_vectors"),
        }
        return frozenset(name for name, there in offers.items() if there)

    def generate(self, samples: Sequence[Sample], **decoding: Any) -> list[str]:
        """The text after each sample's prompt; greedy unless `decoding` says otherwise."""
        texts = [""] * len(samples)
        tokenizer = self.processor.tokenizer
        ends = {tokenizer.pad_token_id, tokenizer.eos_token_id} - {None}
        silent = torch.tensor(sorted(ends))

        def collate(rows: Sequence[int]) -> Batch:
            batch = self.processor.prompts([samples[row] for row in rows])
            cut = self._reached(written(batch).mask.sum(1))  # (B,)
            for row, long in zip(rows, cut.tolist(), strict=True):
                if long:
                    raise DataError(self._too_long(f"the prompt of sample '{samples[row].id}'"))
            return batch

        with _evaluating(self.model):
            for rows, batch in self._batches(samples, collate):
                ids = self.model.generate(batch, **decoding).cpu()  # (B,new)
                self.generated_tokens += int((~torch.isin(ids, silent)).sum())
                for row, text in zip(rows, self.processor.decode(ids), strict=True):
                    texts[row] = text
        return texts

    def loglikelihood(
        self, samples: Sequence[Sample], candidates: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Score of each candidate as the last assistant turn, its stop token included.

        The candidates of a sample stand in one row, behind the image and the prompt they share.
        """
        scores: list[list[Score]] = [[] for _ in samples]

        def collate(rows: Sequence[int]) -> Batch:
            answered = [_answered(samples[row], candidates[row]) for row in rows]
            names = f"'{samples[rows[0]].id}' to '{samples[rows[-1]].id}'"
            try:
                batch = getattr(self.processor, "candidates", self.processor.rows)(answered)
            except DataError as error:
                raise DataError(f"candidates of samples {names}: {error}") from None
            # a position counts from the start of its own sample, packed or not
            if self._reached(batch.text["language"].positions.max() + 1):
                raise DataError(self._too_long(f"one of the candidates of samples {names}"))
            return batch

        with _evaluating(self.model):
            for rows, batch in self._batches(samples, collate, candidates):
                sums, counts = self._answer_sums(batch)
                at = 0
                for row in rows:
                    for candidate in candidates[row]:
                        length = len(candidate.encode("utf-8"))
                        scores[row].append(Score(sums[at], counts[at], length))
                        at += 1
                if at != len(sums):
                    raise RuntimeError(f"{at} candidates, but {len(sums)} segments in the batch")
        return scores

    def embed_images(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,K,E) unit vectors in float32 on the CPU, K an image."""
        if "match" not in self.capabilities:
            return self._over_images(self.model.embed_images, refs)
        parts = []
        with _evaluating(self.model):
            for start in range(0, len(refs), self.batch_size):
                some = refs[start : start + self.batch_size]
                images = self._seen(some)
                rows = self.model.embed_images(images).float().cpu()  # (U,K,E)
                parts.append(rows[[images.keys.index(ref.key) for ref in some]])
        return torch.cat(parts)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N,E) unit vectors in float32 on the CPU, whatever the order and the batch size."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        parts = []
        with _evaluating(self.model):
            for start in range(0, len(texts), self.batch_size):
                rows = [texts[i] for i in order[start : start + self.batch_size]]
                tokens = self.processor.encode(rows, self.processor.max_length)
                parts.append(self.model.embed_texts(tokens.to(self.device)).float().cpu())
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def match(self, refs: Sequence[ImageRef], texts: Sequence[str]) -> Tensor:
        """(N,2) logits of "no" and "yes" for pairs of an image and a text, in float32 on the CPU.

        Pairs run image by image, so that each image is encoded once.
        """
        first = {ref.key: i for i, ref in reversed(list(enumerate(refs)))}
        order = sorted(range(len(refs)), key=lambda i: (first[refs[i].key], i))
        parts = []
        with _evaluating(self.model), self.keeping():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                images = self._seen([refs[i] for i in rows])
                states, real = self.model.states(images)  # (U,P,D)
                index = torch.tensor([images.keys.index(refs[i].key) for i in rows])
                index = index.to(self.device)
                tokens = self.processor.encode([texts[i] for i in rows], use="match")
                logits = self.model.match_logits(
                    states[index], None if real is None else real[index], tokens.to(self.device)
                )
                parts.append(logits.float().cpu())
        return torch.cat(parts)[torch.tensor(order).argsort()]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within it, images of a model that matches are encoded once for `embed` and `match`."""
        outer = self._kept
        self._kept = {} if outer is None else outer
        try:
            yield
        finally:
            self._kept = outer

    def _seen(self, refs: Sequence[ImageRef]) -> Images:
        """The distinct images of `refs` with their features, of which the kept ones are reused."""
        distinct = {ref.key: ref for ref in refs}
        kept = {} if self._kept is None else self._kept
        found = {key: kept[key] for key in distinct if key in kept}
        new = [ref for key, ref in distinct.items() if key not in found]
        if new:
            pixels = torch.stack([self.processor.images.transform(ref.open()) for ref in new])
            encoded = self.model.vision(Images([r.key for r in new], pixels).to(self.device))
            self.vision_calls += len(new)
            for ref, features in zip(new, _split(encoded), strict=True):
                found[ref.key] = ImageFeatures(*(None if v is None else v.cpu() for v in features))
            kept |= {ref.key: found[ref.key] for ref in new}
            most = KEPT_BYTES // max(1, found[new[0].key].tokens.nbytes)
            for key in list(kept)[: max(0, len(kept) - max(most, len(distinct)))]:
                del kept[key]  # the oldest
        images = Images(list(distinct), features=_merge([found[key] for key in distinct]))
        return images.to(self.device)

    def features(self, refs: Sequence[ImageRef]) -> Tensor:
        """(N,D) image vectors before any projection, for a linear probe."""
        return self._over_images(self.model.image_vectors, refs)

    def _over_images(self, run: Callable[[Images], Tensor], refs: Sequence[ImageRef]) -> Tensor:
        transform, parts = self.processor.images.transform, []
        with _evaluating(self.model):
            for start in range(0, len(refs), self.batch_size):
                some = refs[start : start + self.batch_size]
                pixels = torch.stack([transform.read(ref) for ref in some])
                images = Images([ref.key for ref in some], pixels).to(self.device)
                parts.append(run(images).float().cpu())
                self.vision_calls += len(some)
        return torch.cat(parts)

    def _reached(self, lengths: Tensor) -> Tensor:
        """Where a sample is as long as the processor's limit, behind which it cuts in silence."""
        return lengths >= getattr(self.processor, "max_length", float("inf"))

    def _too_long(self, what: str) -> str:
        limit = self.processor.max_length
        return f"{what} reaches data.max_length={limit} tokens and may be cut; raise it."

    def _batches(
        self,
        samples: Sequence[Sample],
        collate: Callable[[list[int]], Batch],
        candidates: Sequence[Sequence[str]] = (),
    ) -> Iterator[tuple[list[int], Batch]]:
        """Rows of `samples` with their batch, images encoded, as many at a time as `pieces`."""
        kept: dict[str, ImageFeatures] = {}  # lives for one call: weights may change after it
        named = candidates or [()] * len(samples)
        pairs = zip(samples, named, strict=True)
        tokens = [row_tokens(sample, self.image_tokens, names) for sample, names in pairs]
        for rows in pieces(samples, self.batch_size, tokens):
            batch = collate(rows).to(self.device)
            yield rows, self._encode(batch, kept)

    def _encode(self, batch: Batch, kept: dict[str, ImageFeatures]) -> Batch:
        """The batch with its images' features; those of the batch before are used again."""
        images = batch.images
        if images is None or images.features is not None:
            return batch
        if images.extra or images.pixels is None or not hasattr(self.model, "features"):
            self.vision_calls += len(images)
            return batch
        new = [i for i, key in enumerate(images.keys) if key not in kept]
        if new:
            missing = Images([images.keys[i] for i in new], images.pixels[new])
            features = self.model.features(replace(batch, images=missing))
            kept |= dict(zip(missing.keys, _split(features), strict=True))
            self.vision_calls += len(new)
        for key in set(kept) - set(images.keys):
            del kept[key]
        features = _merge([kept[key] for key in images.keys])
        return replace(batch, images=Images(images.keys, features=features))

    def _answer_sums(self, batch: Batch) -> tuple[list[float], list[int]]:
        """Log-likelihood and tokens of the last answer of every segment, in reading order."""
        tokens = written(batch)
        hidden = self.model(batch)  # (B,T,D)
        row, column, segment = _last_answers(tokens)  # (N,) each
        reads_on = _reads_on(self.model.language)
        before = predecessors(tokens)[row, column] if reads_on else column  # masks: their own
        labels = tokens.labels[row, column]
        chances = torch.cat(
            [
                self.model.language.logits(h).float().log_softmax(-1).gather(-1, w[:, None])[:, 0]
                for h, w in zip(
                    hidden[row, before].split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True
                )
            ]
        )
        total = int(segment.max()) + 1
        sums = torch.zeros(total, dtype=torch.float64, device=chances.device)
        sums.index_add_(0, segment, chances.double())
        return sums.tolist(), torch.bincount(segment, minlength=total).tolist()


def _reads_on(language: Any) -> bool:
    """Whether texts of any length are written token by token, not into a few masks."""
    return language.attention != "bidirectional"


def _answered(sample: Sample, candidates: Sequence[str]) -> list[Sample]:
    """The sample once for each candidate; nameless, so that no processor remembers them."""
    return [replace(sample, id="", messages=[*sample.prompt, assistant(c)]) for c in candidates]


def _last_answers(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and number of segment of the supervised tokens of each segment's last answer.

    Segments are numbered over the batch in reading order. Between two answers of a dialogue
    stands at least one unsupervised token, so the last answer is the last run of labels.
    """
    row, column = (tokens.labels != IGNORE).nonzero(as_tuple=True)  # (N,) in reading order
    segment = tokens.segments[row, column]
    changed = (row.diff() != 0) | (segment.diff() != 0)
    number = torch.cat([changed.new_zeros(1), changed]).cumsum(0)  # of the segment, over the batch
    gap = changed | (column.diff() != 1)
    run = torch.cat([gap.new_zeros(1), gap]).cumsum(0)
    last = torch.zeros_like(run).scatter_reduce_(0, number, run, "amax")  # by segment
    keep = run == last[number]
    return row[keep], column[keep], number[keep]


def _split(features: ImageFeatures) -> list[ImageFeatures]:
    tokens = features.tokens.split(features.counts.tolist())
    pooled = [None] * len(tokens) if features.pooled is None else features.pooled.split(1)
    counts = features.counts.split(1)
    return [ImageFeatures(*one) for one in zip(tokens, counts, pooled, strict=True)]


def _merge(features: Sequence[ImageFeatures]) -> ImageFeatures:
    tokens, counts, pooled = zip(*features, strict=True)
    joined = None if pooled[0] is None else torch.cat(pooled)
    return ImageFeatures(torch.cat(tokens), torch.cat(counts), joined)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inference in eval mode; afterwards every module is exactly as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

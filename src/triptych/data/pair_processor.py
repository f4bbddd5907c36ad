"""Images with captions or questions, for models that read, match and write about one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.data.instruct import answer, instruction
from triptych.data.processor import ImageLoader
from triptych.parts.pair_text import PairText
from triptych.types import Batch, DataError, Images, Sample, Tokens


@dataclass
class PairProcessor:
    """A row a sample: `decoder` is written about the image.

    Beside it stands the caption once more as `text`, to be compared and matched, or the `question`
    that is answered. A caption's prompt begins with `opening` ("a picture of " in BLIP).
    """

    part: PairText
    images: ImageLoader
    max_length: int = 2048  # the part's own limit holds beside it
    opening: str = ""

    @property
    def tokenizer(self):  # noqa: ANN201  (the library's type is imported lazily)
        return self.part.tokenizer

    def encode(self, texts: list[str], max_length: int | None = None, use: str = "read") -> Tokens:
        """Texts to be compared ("read"), or matched beside an image ("match")."""
        most = min(max_length or self.max_length, self.max_length)
        return self.part.encode(list(texts), most, use=use)

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return self.collate([sample for row in rows for sample in row])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A training batch."""
        images, slots = self._pictures(samples)
        text = self._questions(samples)
        said = [answer(s) for s in samples]
        if not text:
            text["text"] = self.part.encode(said, self.max_length)
        text["decoder"] = self.part.encode(said, self.max_length, use="write")
        return Batch(images, slots, text, list(samples))

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Rows on which the model writes on: a caption's opening, or the start of an answer."""
        images, slots = self._pictures(samples)
        text = self._questions(samples)
        opening = "" if text else self.opening
        text["decoder"] = self.part.prompt([opening] * len(samples))
        return Batch(images, slots, text, list(samples))

    def _questions(self, samples: Sequence[Sample]) -> dict[str, Tokens]:
        asked = [instruction(s) for s in samples]
        if not any(asked):
            return {}
        if not all(asked):
            odd = samples[asked.index("")]
            raise DataError(
                f"sample '{odd.id}' is a caption among questions; a batch holds one kind, so give "
                "them data sets of their own."
            )
        return {"question": self.part.encode(asked, self.max_length)}

    def decode(self, ids: Tensor) -> list[str]:
        """(B,T) generated ids as text without special tokens."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _pictures(self, samples: Sequence[Sample]) -> tuple[Images | None, Tensor]:
        for sample in samples:
            if len(sample.images) != 1:
                raise DataError(
                    f"sample '{sample.id}' has {len(sample.images)} images; this model reads "
                    "exactly one image beside its text."
                )
        images, index = self.images(samples)
        slots = [[index[s.images[0].key], b, 1] for b, s in enumerate(samples)]
        return images, torch.tensor(slots)

"""HostedProcessor: dialogues to batches through a library model's own processor and template.

Rows hold one sample each. Masks come from the template's own segments (its generation marks, else
growing prefixes of the dialogue) as characters, carried through the processor's image expansions
by the offsets it reports; a processor that rewrites the text in other ways is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triptych.data.idefics import reporting
from triptych.data.processor import _inside
from triptych.data.templates import Rendered, render_prompt_turns, render_turns
from triptych.parts.pretrained import resolve
from triptych.types import IGNORE, Batch, DataError, Images, Sample, Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

# Keys of a processor's output that are no input of the model's forward.
NOT_INPUTS = ("labels", "offset_mapping", "text_replacement_offsets", "input_ids", "attention_mask")


class HostedProcessor:
    """One sample a row, with everything the library's processor adds in `Batch.images.extra`.

    library: a processor with a fast tokenizer and an image processor. max_length: tokens of a row;
    a longer sample is cut at its end, never inside or before an image.
    """

    packs = False

    def __init__(self, library: ProcessorMixin, max_length: int = 2048) -> None:
        self.library, self.max_length = library, max_length
        self.tokenizer: PreTrainedTokenizerBase = library.tokenizer
        self.name = type(library).__name__
        template = getattr(library, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.tokenizer.chat_template = template
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # PaliGemma's format: one question as a prefix, one answer as a suffix, and no template
        self.takes_suffix = "suffix" in inspect.signature(type(library).__call__).parameters

    @classmethod
    def of(cls, id: str, revision: str | None, template: str | None) -> HostedProcessor:
        """The processor of a hub id or folder; `template` (a file or text) replaces its own."""
        from transformers import AutoProcessor

        source = resolve(id)
        try:
            library = AutoProcessor.from_pretrained(
                source, revision=revision or "main", trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TriptychError(
                f"'{id}' has no processor that can be loaded ({reason})."
            ) from error
        if not hasattr(library, "image_processor") or not hasattr(library, "tokenizer"):
            raise TriptychError(
                f"'{id}' has no preprocessor_config.json beside its tokenizer; name a folder or "
                "hub id with the model's whole processor."
            )
        if not library.tokenizer.is_fast:
            raise TriptychError(f"'{id}' has no fast tokenizer, whose offsets the masks need.")
        library.tokenizer.name_or_path = id
        if template is not None:
            path = Path(resolve(template))
            library.chat_template = path.read_text() if path.suffix == ".jinja" else template
        return cls(reporting(library))

    def rows(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        """A training batch: every sample of every row in a row of its own."""
        return self.collate([sample for row in rows for sample in row])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A right-padded batch with labels on what the assistant says."""
        if self.takes_suffix:
            texts = [self._prefix(s, answered=True) for s in samples]
            out = self._run(samples, texts, "right", suffix=[_answer(s) for s in samples])
            labels = out["labels"]  # (B,T)
        else:
            rendered = [self._render(s) for s in samples]
            out = self._run(samples, [r.text for r in rendered], "right", offsets=True)
            labels = self._labels(samples, rendered, out)
        out, labels = self._cut(samples, out, labels)
        for sample, row in zip(samples, labels, strict=True):
            if bool((row == IGNORE).all()):
                raise DataError(
                    f"sample '{sample.id}' has nothing to predict: no assistant words within its "
                    f"first {self.max_length} tokens; drop it or raise data.max_length."
                )
        return _batch(samples, out, labels)

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Left-padded rows that end where the assistant is to speak, one a sample."""
        if self.takes_suffix:
            texts = [self._prefix(sample, answered=False) for sample in samples]
        else:
            turns = [self._turns(sample, sample.prompt) for sample in samples]
            texts = [render_prompt_turns(t, self.tokenizer) for t in turns]
        return _batch(samples, self._run(samples, texts, "left"), None)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, whatever the checkpoint states."""
        return [self.tokenizer.eos_token_id, *getattr(self.library, "stop_ids", ())]

    def decode(self, ids: Tensor) -> list[str]:
        """(B,T) generated ids as text without special tokens."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the library's processor with its tokenizer and template."""
        self.library.save_pretrained(folder)

    @cached_property
    def structured(self) -> bool:
        """Whether the template takes a turn's content as a list of parts, or as one string."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            return "'type'" not in render_prompt_turns(probe, self.tokenizer)
        except TypeError:  # the template adds the content to a string
            return False

    def _render(self, sample: Sample) -> Rendered:
        try:
            return render_turns(self._turns(sample, sample.messages), self.tokenizer)
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error

    def _turns(self, sample: Sample, messages: list[dict]) -> list[dict]:
        """The messages in the form the template takes, their images counted."""
        _check_images(sample, messages)
        turns = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        if self.structured:
            return turns
        mark = self.library.image_token
        words = [
            "".join(mark if p["type"] == "image" else p["text"] for p in t["content"])
            for t in turns
        ]
        return [t | {"content": w} for t, w in zip(turns, words, strict=True)]

    def _prefix(self, sample: Sample, answered: bool) -> str:
        """The question of a prefix-suffix model, with its images in front."""
        messages, turns = sample.prompt, sample.messages
        _check_images(sample, messages)
        if len(messages) != 1 or messages[0]["role"] != "user" or not sample.images:
            raise DataError(
                f"sample '{sample.id}' has {len(turns)} turns and {len(sample.images)} images; "
                f"{self.name} takes one question about an image and one answer."
            )
        if answered and len(turns) != 2:
            raise DataError(
                f"sample '{sample.id}' has nothing to predict: it ends with a question."
            )
        words = [p["text"] for p in _parts(messages[0]["content"]) if p["type"] == "text"]
        return self.library.image_token * len(sample.images) + "".join(words)

    def _run(
        self,
        samples: Sequence[Sample],
        texts: list[str],
        side: str,
        offsets: bool = False,
        **more: Any,
    ) -> BatchFeature:
        """Call the library's processor on a batch; what it refuses is said with sample ids."""
        images = [[_open(ref, s) for ref in s.images] for s in samples]
        options: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if offsets:
            options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        bos = self.tokenizer.bos_token
        if bos and texts[0].startswith(bos):
            options["add_special_tokens"] = False  # the template has written it
        try:
            return self.library(
                text=list(texts), images=images if any(images) else None, **options, **more
            )
        except (ValueError, IndexError, StopIteration) as error:
            names = ", ".join(f"'{s.id}'" for s in samples[:5])
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.name} refuses the samples {names}: {reason}") from error

    def _labels(
        self, samples: Sequence[Sample], rendered: Sequence[Rendered], out: BatchFeature
    ) -> Tensor:
        """(B,T) the ids whose characters lie in the template's spans, -100 elsewhere."""
        ids, mask = out["input_ids"], out["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORE)
        replaced = out.get("text_replacement_offsets") or [[] for _ in samples]
        for row, (sample, text) in enumerate(zip(samples, rendered, strict=True)):
            offsets, spans = out["offset_mapping"][row].tolist(), text.spans
            if sample.images and not _follows(text.text, replaced[row], len(sample.images)):
                offsets = self._tail_offsets(text.text, ids[row][mask[row]].tolist(), ids.shape[1])
            else:
                spans = _shift(spans, replaced[row])
            kept = [_inside(start, end, spans) for start, end in offsets]
            here = torch.tensor(kept) & mask[row]
            labels[row, here] = ids[row, here]
        return labels

    def _tail_offsets(self, text: str, ids: list[int], width: int) -> list[tuple[int, int]]:
        """Offsets by the tokenizer alone, for processors that only put image tokens in front."""
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        count = len(plain["input_ids"])
        if ids[-count:] != plain["input_ids"]:
            raise TriptychError(
                f"{self.name} rewrites the text of '{self.tokenizer.name_or_path}' in a way that "
                "its masks cannot follow; train this model without images before an answer, or "
                "use it without training."
            )
        front = [(0, 0)] * (len(ids) - count)
        return front + plain["offset_mapping"] + [(0, 0)] * (width - len(ids))

    def _cut(
        self, samples: Sequence[Sample], out: BatchFeature, labels: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """At most max_length tokens a row, all of its images among them."""
        shape, limit = out["input_ids"].shape, self.max_length
        if shape[1] <= limit:
            return dict(out), labels
        images = torch.tensor([i for i in self._image_ids() if i is not None], dtype=torch.long)
        behind = torch.isin(out["input_ids"][:, limit:], images).any(1)
        for row, sample in enumerate(samples):
            if behind[row] or (sample.images and not len(images)):
                raise DataError(
                    f"sample '{sample.id}' is longer than data.max_length={limit} tokens and its "
                    "images do not end before; raise data.max_length or give fewer images."
                )
        cut = {
            key: value[:, :limit] if torch.is_tensor(value) and value.shape[:2] == shape else value
            for key, value in out.items()
        }
        return cut, labels[:, :limit]

    def _image_ids(self) -> list[int | None]:
        try:
            return list(self.library.image_token_ids)
        except (AttributeError, TypeError):
            return [getattr(self.library, "image_token_id", None)]


def _batch(samples: Sequence[Sample], out: dict[str, Any], labels: Tensor | None) -> Batch:
    mask = out["attention_mask"].long()  # (B,T)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    tokens = Tokens(out["input_ids"], positions, mask, labels)
    places = [(ref.key, row) for row, sample in enumerate(samples) for ref in sample.images]
    extra = {k: v for k, v in out.items() if k not in NOT_INPUTS and torch.is_tensor(v)}
    images = Images([key for key, _ in places], extra=extra) if extra else None
    slots = torch.tensor([[i, row, 1] for i, (_, row) in enumerate(places)]) if places else None
    return Batch(images, slots, {"language": tokens}, list(samples))


def _parts(content: list[dict] | str) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _answer(sample: Sample) -> str:
    return "".join(p["text"] for p in _parts(sample.messages[-1]["content"]) if p["type"] == "text")


def _check_images(sample: Sample, messages: list[dict]) -> None:
    written = sum(p["type"] == "image" for m in messages for p in _parts(m["content"]))
    if written != len(sample.images):
        raise DataError(
            f"sample '{sample.id}': the dialogue writes {written} images and the sample brings "
            f"{len(sample.images)}; give each image one place."
        )


def _open(ref: Any, sample: Sample) -> Any:
    try:
        return ref.open()
    except DataError as error:
        raise DataError(f"sample '{sample.id}': {error}") from error


def _follows(text: str, replaced: Sequence[dict], images: int) -> bool:
    """Whether the reported replacements are those of this very text, one an image."""
    written = [text[slice(*r["span"])] == r["text"] for r in replaced]
    return len(written) == images and all(written)


def _shift(spans: Sequence[tuple[int, int]], replaced: Sequence[dict]) -> list[tuple[int, int]]:
    """Character spans of the rendered text in the text whose images are expanded."""
    grown = [(r["span"][1], r["new_span"][1] - r["span"][1]) for r in replaced]

    def moved(at: int) -> int:
        return at + [0, *(gain for end, gain in grown if end <= at)][-1]

    return [(moved(start), moved(end)) for start, end in spans]

"""What is wrong with a data set, found before a run meets it: all samples, not the first mistake.

Each finding names its sample. Some would stop a run (a picture that cannot be read, a dialogue with
nothing to predict); the others train in silence, which is worse: answers cut at the limit, turns
that were not split, the same question with two answers, texts in a broken encoding.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from triptych.data.processor import CaptionProcessor, ChatProcessor, Encoded
from triptych.models.fusion import IMAGE
from triptych.types import IGNORE, DataError, ImageRef, Sample

STOPS = ("unreadable", "refused", "too long")  # kinds of finding at which a run would end
AHEAD = 512  # samples whose pictures are decoded at a time
THIN = 4.0  # sides of a picture whose ratio is larger lose much of it to a square
SMALL = 0.5  # of the model's side: a smaller picture is mostly interpolation
SHORT, ENOUGH = 60, 20  # characters of an answer that is counted; answers of which to speak
UNLIMITED = 1 << 40  # tokens: the length before any cut is asked for
COMMON = 0.5  # share of one answer from which a model need not look

_SPEAKER = re.compile(r"^\s*(?:#+\s*)?(?:user|human|assistant|gpt|system)\s*:", re.I | re.M)
_LEFT = re.compile(r"<image>|</?s>|<\|[\w ]+\|>|\[/?INST\]", re.I)
_BROKEN = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€[\u0080-\u2122]|[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Finding:
    """One thing to look at; `says` is a sentence that names the sample."""

    kind: str
    says: str
    sample: str = ""

    @property
    def stops(self) -> bool:
        """Whether a run would end at it."""
        return self.kind in STOPS


@dataclass
class Inspection:
    """What was found in `samples` samples, and how long they are for one model."""

    samples: int = 0
    images: int = 0  # distinct
    findings: list[Finding] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of a sample before any cut
    learned: list[int] = field(default_factory=list)  # tokens of a sample that carry loss
    limit: int = 0  # data.max_length, or less where the text tower takes less
    shown: list[tuple[Sample, Encoded]] = field(default_factory=list)

    def add(self, kind: str, says: str, sample: str = "") -> None:
        self.findings.append(Finding(kind, says, sample))

    @property
    def stops(self) -> bool:
        """Whether a run over these data would end with an error."""
        return any(finding.stops for finding in self.findings)

    def kinds(self) -> dict[str, list[Finding]]:
        """Findings by kind, those that stop a run first, then the most frequent."""
        found: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return dict(sorted(found.items(), key=lambda kv: (not kv[1][0].stops, -len(kv[1]))))


def inspect(
    reader: Sequence[Sample],
    processor: Any,
    side: int | None = None,
    most: int | None = None,
    show: int = 24,
    progress: bool = True,
) -> Inspection:
    """Read every sample (or the first `most`), decode its pictures, and write it as tokens.

    processor: the model's; rows of dialogues and captions are counted in its tokens, others not.
    side: pixels of the model's shorter side. show: samples kept with their tokens.
    """
    found = Inspection()
    texts, images = _Texts(found), _Images(found, side)
    measure = _measure(processor, found)
    count = len(reader) if most is None else min(most, len(reader))
    bar = tqdm(total=count, desc="Looking at samples", unit="sample", disable=not progress)
    with ThreadPoolExecutor() as pool:
        for start in range(0, count, AHEAD):
            window = range(start, min(start + AHEAD, count))
            for sample, sizes in pool.map(partial(_read, reader, images.sizes), window):
                found.samples += 1
                bar.update()
                if isinstance(sample, DataError):
                    found.add("unreadable", str(sample))
                elif images.look(sample, sizes):
                    texts.look(sample)
                    encoded = measure(sample)
                    if encoded is not None and len(found.shown) < show:
                        found.shown.append((sample, encoded))
    bar.close()
    texts.finish()
    found.images = len(images.sizes)
    return found


def _read(
    reader: Sequence[Sample], known: dict[str, Any], index: int
) -> tuple[Sample | DataError, list[Any]]:
    """The sample, and (width, height) or the error of each of its images."""
    try:
        sample = reader[index]
    except DataError as error:
        return error, []
    return sample, [known.get(ref.key) or _size(ref) for ref in sample.images]


def _size(ref: ImageRef) -> tuple[int, int] | DataError:
    try:
        return ref.open().size
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"image '{ref.name}' cannot be read ({error}).")


class _Images:
    """Pictures that cannot be read, or that lose most of what they show."""

    def __init__(self, found: Inspection, side: int | None) -> None:
        self.found, self.side = found, side
        self.sizes: dict[str, Any] = {}

    def look(self, sample: Sample, sizes: Sequence[Any]) -> bool:
        """False if one of the sample's pictures cannot be read."""
        readable = True
        for ref, size in zip(sample.images, sizes, strict=True):
            new = ref.key not in self.sizes
            self.sizes[ref.key] = size
            if isinstance(size, DataError):
                readable, says = False, str(size)
                named = says if says.startswith("sample ") else f"sample '{sample.id}': {says}"
                self.found.add("unreadable", named, sample.id)
            elif new:
                self._shape(ref, size, sample.id)
        return readable

    def _shape(self, ref: ImageRef, size: tuple[int, int], name: str) -> None:
        wide, high = size
        says = f"image '{ref.name}' of sample '{name}' has {wide} x {high} pixels"
        if max(size) > THIN * min(size):
            text = f"{says}; a square of it shows little, cut it or pad it."
            self.found.add("thin picture", text, name)
        elif self.side and min(size) < SMALL * self.side:
            text = f"{says} where the model looks at {self.side}; it will be blurred."
            self.found.add("small picture", text, name)


class _Texts:
    """Words that teach the wrong thing without any error."""

    def __init__(self, found: Inspection) -> None:
        self.found = found
        self.first: dict[bytes, str] = {}  # the whole sample -> who said it first
        self.asked: dict[bytes, tuple[bytes, str, str]] = {}  # prompt over images -> answer, sample
        self.answers: Counter[str] = Counter()
        self.answered = 0

    def look(self, sample: Sample) -> None:
        name, images = sample.id, tuple(ref.key for ref in sample.images)
        turns = [(m["role"], _words(m)) for m in sample.messages]
        self._turns(name, sample, turns)
        whole = _digest((images, turns))
        if whole in self.first:
            text = f"sample '{name}' says what '{self.first[whole]}' says."
            self.found.add("repeated", text, name)
            return
        self.first[whole] = name
        if not turns or turns[-1][0] != "assistant":
            return
        answer = turns[-1][1]
        plain = " ".join(answer.lower().split())
        if len(plain) <= SHORT:  # long texts hardly repeat, and would fill the memory
            self.answers[plain] += 1
        self.answered += 1
        if not any(words.strip() for _, words in turns[:-1]):
            return  # captions: an image may have many
        mine = (_digest(plain), _cut(answer), name)
        same, other, before = self.asked.setdefault(_digest((images, turns[:-1])), mine)
        if same != mine[0]:
            text = f"samples '{before}' and '{name}' ask the same of the same image and answer "
            self.found.add("contradiction", f"{text}'{other}' and '{_cut(answer)}'.", name)

    def _turns(self, name: str, sample: Sample, turns: Sequence[tuple[str, str]]) -> None:
        for number, (role, words) in enumerate(turns, 1):
            where = f"turn {number} ({role}) of sample '{name}'"
            pictures = any(p["type"] == "image" for p in sample.messages[number - 1]["content"])
            if not words.strip() and not pictures:
                self.found.add("empty turn", f"{where} is empty; drop it or write it.", name)
            if spoken := _SPEAKER.search(words):
                text = f"{where} holds '{spoken[0].strip()}': turns that were not split."
                self.found.add("unsplit turns", text, name)
            if left := _LEFT.search(words):
                text = f"{where} holds '{left[0]}', a mark of some template; take it out."
                self.found.add("template marks", text, name)
            if broken := _BROKEN.search(words):
                text = f"{where} holds {broken[0]!r}: text in a broken encoding, save it as UTF-8."
                self.found.add("broken encoding", text, name)
        target, listed = str(sample.target), sample.candidates
        if listed and sample.target is not None and target not in listed:
            text = f"the answer '{_cut(target)}' of sample '{name}' is none of its candidates; "
            self.found.add("outside its list", f"{text}correct one of them.", name)

    def finish(self) -> None:
        """What only the whole set shows."""
        for answer, count in self.answers.most_common(1):
            if self.answered >= ENOUGH and count > COMMON * self.answered:
                share = 100 * count / self.answered
                text = f"'{answer}' is {share:.0f} % of all answers: a model that never looks "
                self.found.add("one answer", f"{text}reaches that.")


def _measure(processor: Any, found: Inspection) -> Any:
    """A function of a sample that counts its tokens, and gives them where they have labels."""
    found.limit = processor.max_length
    if isinstance(processor, ChatProcessor) and type(processor).rows is ChatProcessor.rows:
        whole = replace(processor, max_length=UNLIMITED, _cache={})
        return partial(_measure_row, processor, whole, found)
    if isinstance(processor, CaptionProcessor):
        tower = getattr(processor.encode, "__self__", None)
        found.limit = min(processor.max_length, getattr(tower, "max_length", processor.max_length))
        return partial(_measure_caption, getattr(tower, "tokenizer", None), found)
    processor.max_length = UNLIMITED
    return partial(_measure_batch, processor, found)


def _measure_row(
    processor: ChatProcessor, whole: ChatProcessor, found: Inspection, sample: Sample
) -> Encoded | None:
    whole._cache.clear()  # every sample is asked once
    try:
        full = whole.encode(sample)
    except DataError as error:
        found.add("refused", str(error), sample.id)
        return None
    labels = _learned(full, {processor.tokenizer.eos_token_id}, found, sample)
    if len(full) <= processor.max_length:
        return full
    try:
        cut = processor.encode(sample)
    except DataError as error:
        found.add("too long", str(error), sample.id)
        return full
    lost = labels - sum(label != IGNORE for label in cut.labels)
    text = f"sample '{sample.id}' has {len(full)} tokens and data.max_length={processor.max_length}"
    found.add("cut", f"{text}: {lost} that carry loss are cut.", sample.id)
    return cut


def _learned(encoded: Encoded, stops: set[int], found: Inspection, sample: Sample) -> int:
    """How many tokens of a sample carry loss; its last one or two should end the answer."""
    labels = [label for label in encoded.labels if label != IGNORE]
    found.lengths.append(len(encoded))
    found.learned.append(len(labels))
    if labels and not stops & set(labels[-2:]):
        text = f"no stop token carries loss in sample '{sample.id}': the model never learns to end "
        found.add("no stop token", f"{text}its answers; look at the chat template.", sample.id)
    return len(labels)


def _measure_batch(processor: Any, found: Inspection, sample: Sample) -> Encoded | None:
    """By the batch itself, for processors that write rows in their own way."""
    try:
        batch = processor.rows([[sample]])
    except DataError as error:
        found.add("refused", str(error), sample.id)
        return None
    tokens = batch.text.get("decoder") or batch.text.get("language")
    if tokens is None or tokens.labels is None:
        return None
    real = tokens.mask[0]
    ids, labels = tokens.ids[0][real], tokens.labels[0][real]
    mark = getattr(getattr(processor, "library", None), "image_token_id", IMAGE)
    encoded = Encoded([], ids.where(ids != mark, IMAGE).tolist(), labels.tolist(), 0, 0)
    stops = set(getattr(processor, "stop_ids", [processor.tokenizer.eos_token_id]))
    _learned(encoded, stops, found, sample)
    if len(encoded) > found.limit:
        text = f"sample '{sample.id}' has {len(encoded)} tokens and data.max_length={found.limit}: "
        found.add("cut", f"{text}its end is cut.", sample.id)
    return encoded


def _measure_caption(tokenizer: Any, found: Inspection, sample: Sample) -> None:
    if len(sample.images) != 1:
        text = f"sample '{sample.id}' has {len(sample.images)} images; contrastive training takes "
        found.add("refused", f"{text}exactly one.", sample.id)
    elif tokenizer is not None:
        length = len(tokenizer(sample.text)["input_ids"])
        found.lengths.append(length)
        if length > found.limit:
            text = f"the caption of sample '{sample.id}' has {length} tokens; the text tower reads "
            found.add("cut", f"{text}{found.limit}.", sample.id)


def runs(encoded: Encoded) -> Iterator[tuple[str, list[int]]]:
    """The tokens of a sample in runs of one kind: "image", "read" or "learned"."""
    ids = encoded.prefix + encoded.ids
    labels = [IGNORE] * len(encoded.prefix) + encoded.labels
    kind, run = "", []
    for token, label in zip(ids, labels, strict=True):
        now = "image" if token == IMAGE else "read" if label == IGNORE else "learned"
        if now != kind and run:
            yield kind, run
            run = []
        kind = now
        run.append(token)
    if run:
        yield kind, run


def _words(message: dict) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def _digest(value: object) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + "…"

"""Reading words: pictures that are drawn here, and a user's folder with transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triptych.data.pairs import SUFFIXES
from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Table, field, read_table
from triptych.types import DataError, ImageRef, Sample, assistant, user

PROMPT = "What is written in the image?"
LEVELS = ("plain", "colour", "turned", "noisy")
_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "st",
    "tr",
    "pl",
    "gr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ou"]
_ENDS = ["", *["n", "r", "s", "t", "l", "m", "nd", "rk", "st"]]


class Words(Sequence[Sample]):
    """`size` drawn pictures of one to three made-up words or a number: nothing can be guessed.

    The level (meta["level"]) rises in turn: plain is black on white, colour takes any two distinct
    colours and sizes, turned is also rotated by up to 12 degrees, noisy also has grain. A picture
    is a function of seed, split and index.
    """

    def __init__(
        self,
        split: str = "test",
        size: int = 400,
        seed: int = 0,
        image_size: int = 224,
        prompt: str = PROMPT,
    ) -> None:
        if split not in ("train", "test") or size < 1 or image_size < 64:
            raise DataError(
                f"words need split train or test, size 1 or more and image_size 64 or more, not "
                f"{split}, {size}, {image_size}."
            )
        self.split, self.size, self.seed = split, size, seed
        self.image_size, self.prompt = image_size, prompt
        self.clusters = [f"words/{split}/{index}" for index in range(size)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = range(self.size)[index]
        text, level, name = self._text(index), LEVELS[index % len(LEVELS)], self.clusters[index]
        key = f"words/{self.split}/{self.seed}/{self.image_size}/{index}"
        ref = ImageRef(key, partial(self._draw, index), name)
        return Sample(
            [user(self.prompt, images=1), assistant(text)],
            [ref],
            target=text,
            id=name,
            cluster=name,
            source="words",
            meta={"level": level},
        )

    def _random(self, index: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.split == "test", index, purpose])

    def _text(self, index: int) -> str:
        random = self._random(index, 0)
        if random.random() < 0.2:
            return str(int(random.integers(10, 1_000_000)))
        return " ".join(_word(random) for _ in range(int(random.integers(1, 4))))

    def _draw(self, index: int) -> Image.Image:
        level, random, side = index % len(LEVELS), self._random(index, 1), self.image_size
        ink, paper = _colors(random) if level else ((0, 0, 0), (255, 255, 255))
        lines = self._text(index).split(" ")
        picture = Image.new("RGB", (side, side), paper)
        pen = ImageDraw.Draw(picture)
        size = side / 6 * (random.uniform(0.7, 1.1) if level else 1.0)
        longest = max(pen.textlength(line, ImageFont.load_default(size)) for line in lines)
        size *= min(1.0, 0.8 * side / longest)
        font = ImageFont.load_default(size)
        for row, line in enumerate(lines):
            middle = side / 2 + (row - (len(lines) - 1) / 2) * 1.3 * size
            pen.text((side / 2, middle), line, ink, font, anchor="mm")
        if level >= 2:
            angle = random.uniform(-12, 12)
            picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
        if level >= 3:
            grain = random.normal(0, 24, (side, side, 3))
            picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype("uint8"))
        return picture


class Transcripts(Rows):
    """A user's folder of pictures with their words.

    The words stand in `transcripts` (default: the only gt.txt, transcripts.* or labels.* in the
    folder): lines `FILE<tab>TEXT`, CSV or JSON(L) with the columns file (or image) and text; or,
    without such a file, in NAME.txt beside NAME.png.
    """

    def __init__(
        self,
        path: str | Path | None,
        transcripts: str | Path | None = None,
        prompt: str = PROMPT,
        limit: int | None = None,
    ) -> None:
        rows = Table()
        if path is not None:
            folder = Path(path)
            if not folder.is_dir():
                raise DataError(f"option path: '{path}' is no folder of pictures; correct it.")
            rows = _transcribed(folder, transcripts)
        self.prompt, self.stem = prompt, "ocr" if path is None else Path(path).name
        super().__init__(rows, path, limit)

    def read(self, index: int) -> Sample:
        text, name = self.rows[index]["text"], self.name(index)
        return Sample(
            [user(self.prompt, images=1), assistant(text)],
            target=text,
            id=name,
            source=self.stem,
        )

    def picture(self, index: int) -> tuple[Any, str]:
        return [self.rows[index]["file"]], f"{self.stem}/{self.rows[index]['file']}"

    def name(self, index: int) -> str:
        return f"{self.stem}/{self.rows[index]['file']}"


def _transcribed(folder: Path, transcripts: str | Path | None) -> Table:
    if transcripts is None:
        stems = ("gt", "transcripts", "labels")
        kinds = (".txt", ".tsv", ".csv", ".json", ".jsonl")
        named = [folder / f"{stem}{kind}" for stem in stems for kind in kinds]
        found = [file for file in named if file.is_file()]
        if len(found) > 1:
            raise DataError(
                f"folder '{folder}' holds both {found[0].name} and {found[1].name}; choose one "
                "with the option transcripts."
            )
        transcripts = found[0] if found else None
    if transcripts is None:
        pictures = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in SUFFIXES]
        pairs = [(f, f.with_suffix(".txt")) for f in pictures if f.with_suffix(".txt").is_file()]
        rows = [
            {"file": str(f.relative_to(folder)), "text": t.read_text(encoding="utf-8-sig")}
            for f, t in pairs
        ]
    else:
        if not Path(transcripts).is_file():
            raise DataError(f"option transcripts: file '{transcripts}' does not exist; correct it.")
        rows = _listed(Path(transcripts))
    rows = [row | {"text": " ".join(row["text"].split())} for row in rows]
    empty = next((row for row in rows if not row["text"]), None)
    if not rows or empty:
        which = f"'{empty['file']}' has an empty transcript" if empty else "there is no transcript"
        raise DataError(
            f"{which} in '{transcripts or folder}'; write NAME.txt beside NAME.png, or lines "
            "FILE<tab>TEXT in gt.txt."
        )
    return Table(rows)


def _listed(path: Path) -> list[dict[str, str]]:
    kind = path.suffix.lower()
    if kind in (".json", ".jsonl", ".csv"):
        raw: list[dict[str, Any]] = read_table(path, "transcripts")
    else:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n").partition("\t") for line in file if line.strip()]
        raw = [{"file": name, "text": text} for name, _, text in lines]
        if raw and raw[0]["file"] in ("file", "image") and raw[0]["text"] == "text":
            raw = raw[1:]
    where = f"a row of '{path}'"
    return [
        {
            "file": str(field(row, ["file", "image"], where)),
            "text": str(field(row, ["text", "label"], where)),
        }
        for row in raw
    ]


def _word(random: np.random.Generator) -> str:
    parts = [
        str(random.choice(_ONSETS)) + str(random.choice(_VOWELS)) + str(random.choice(_ENDS))
        for _ in range(int(random.integers(1, 4)))
    ]
    word = "".join(parts)
    return word.capitalize() if random.random() < 0.3 else word


def _colors(random: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper whose brightness differs by a third of the scale or more."""
    while True:
        ink, paper = random.integers(0, 256, (2, 3))
        weights = np.array([0.299, 0.587, 0.114])
        if abs(float((ink - paper) @ weights)) > 90:
            return tuple(map(int, ink)), tuple(map(int, paper))

"""Readers: map-style sequences of `Sample` over the files people have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from PIL.Image import Image

from triptych.data.dialogues import read_dialogue
from triptych.data.images import open_image, resolve_inside
from triptych.data.json_rows import read_rows
from triptych.types import DataError, ImageRef, Sample, assistant, user

COLORS = frozenset(("red", "green", "blue", "black", "gray", "teal", "brown", "yellow"))


class EasyVQA(Sequence[Sample]):
    """The questions of the package `easy-vqa`: one coloured shape on a 64 x 64 picture.

    train: 38,575 questions on 4,000 images; test: 9,673 on 1,000. A sample's id is its place in
    the package's own list; `meta["type"]` is yes_no, color or shape.
    """

    def __init__(self, split: str = "train", limit: int | None = None) -> None:
        if split not in ("train", "test"):
            raise DataError(f"easy-VQA has no split '{split}'; use split=train or split=test.")
        try:
            import easy_vqa
        except ImportError:
            raise DataError("data=easy_vqa needs its package: pip install easy-vqa.") from None
        load, paths = {
            "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
            "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
        }[split]
        self.split = split
        self.answers = sorted(easy_vqa.get_answers())
        self.rows = list(islice(zip(*load(), strict=True), limit))  # (question, answer, image id)
        self._files: dict[int, str] = paths()
        self._refs: dict[int, ImageRef] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.rows))[index]  # negative counts from the end, too large raises
        question, answer, image = self.rows[index]
        return Sample(
            messages=[user(question, images=1), assistant(answer)],
            images=[self._image(image)],
            target=answer,
            candidates=self.answers,
            id=f"easy_vqa/{self.split}/{index}",
            cluster=self._name(image),
            source="easy_vqa",
            meta={"type": _answer_type(answer)},
        )

    @cached_property
    def clusters(self) -> list[str]:
        """The image of every question, without opening any."""
        return [self._name(image) for _, _, image in self.rows]

    def _name(self, image: int) -> str:
        return f"easy_vqa/{self.split}/{image}.png"

    def _image(self, image: int) -> ImageRef:
        if image not in self._refs:
            file = self._files[image]
            ref = ImageRef.from_file(file)
            self._refs[image] = ImageRef(
                ref.key, partial(open_image, file), self._name(image), drafts=True
            )
        return self._refs[image]


class Instructions(Sequence[Sample]):
    """A user's own dialogues about images, from JSON (a list) or JSONL (a line a sample).

    The layouts are those of `read_dialogue`; image paths lie below the folder `images` (default:
    the folder of `path`). A row may add `id`, `candidates` (its closed list of answers), and any
    plain fields, which become `meta`; the last assistant turn is the `target`. Sample ids are
    NAME/ROW[:ID], since the ids of public files repeat; `name` (default: the file's) is also the
    `source`.

    At construction up to `check` rows, evenly spread, are parsed and their images looked up
    (0 = none, for who reads them all; pictures are decoded only when used). Rows stay bytes until
    asked for: millions of them cost 16 bytes each from JSONL.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        limit: int | None = None,
        name: str | None = None,
        check: int = 100_000,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        if not self.path.is_file():
            raise DataError(f"file '{path}' does not exist; set data.path to a .json or .jsonl.")
        self.root = Path(images) if images is not None else self.path.parent
        if not self.root.is_dir():
            raise DataError(f"image folder '{self.root}' does not exist; correct data.images.")
        self._rows = read_rows(self.path)
        self._length = len(range(len(self._rows))[:limit])
        if not self._length:
            raise DataError(f"file '{path}' holds no sample; give at least one row.")
        for index in range(0, self._length if check else 0, max(1, self._length // max(1, check))):
            _, _, paths, where = self._read(index)
            for name in paths:
                self._locate(name, where)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        index = range(self._length)[index]
        row, messages, paths, where = self._read(index)
        last = messages[-1]
        answer = " ".join(p["text"] for p in last["content"] if p["type"] == "text")
        candidates = row.get("candidates")
        return Sample(
            messages=messages,
            images=[self._image(name, where) for name in paths],
            target=answer if last["role"] == "assistant" else None,
            candidates=[str(c) for c in candidates] if isinstance(candidates, list) else [],
            id=self._name(index) + (f":{_row_id(row)}" if _row_id(row) else ""),
            cluster="|".join(paths) or self._name(index),
            source=self.name,
            meta={k: v for k, v in row.items() if k not in _LAYOUT and not _is_tree(v)},
        )

    @cached_property
    def clusters(self) -> list[str]:
        """The images of every row as one name, without opening any; parses the whole file."""
        names = ("|".join(self._read(index)[2]) for index in range(len(self)))
        return [name or self._name(index) for index, name in enumerate(names)]

    def _name(self, index: int) -> str:
        return f"{self.name}/{index}"

    def _read(self, index: int) -> tuple[dict, list[dict], list[str], str]:
        """The row, its messages, its image paths, and what errors call it."""
        row, where = self._rows[index], self._rows.place(index)
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object; write one {{...}} a sample.")
        where = f"sample '{_row_id(row)}' ({where})" if _row_id(row) else where
        return row, *read_dialogue(row, where), where

    def _locate(self, name: str, where: str) -> Path:
        try:
            path = resolve_inside(name, self.root)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if not path.is_file():
            raise DataError(f"{where}: image '{name}' is no file; correct its path.")
        return path

    def _image(self, name: str, where: str) -> ImageRef:
        path = self._locate(name, where)
        return ImageRef(
            ImageRef.from_file(path).key, partial(_open_for, path, where), name, drafts=True
        )


_LAYOUT = ("id", "messages", "conversations", "text", "image", "images", "candidates")


def _is_tree(value: object) -> bool:
    return isinstance(value, list | dict)


def _row_id(row: dict) -> str:
    name = row.get("id")
    return "" if name is None else str(name)


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "color" if answer in COLORS else "shape"


def _open_for(path: Path, where: str, draft: int | None = None) -> Image:
    try:
        return open_image(path, draft=draft)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None

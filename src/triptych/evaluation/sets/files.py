"""What all benchmark readers share: pictures beside or inside their tables, samples one by one."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from triptych.data.images import open_image, resolve_inside
from triptych.evaluation.sets.tables import Row, Stored
from triptych.types import DataError, ImageRef, Sample, content_key

CHECKED = 100  # pictures looked up when a reader is made
LEAST_BASE64 = 64  # shorter cells of MMBench name the row that holds the picture


class Pictures:
    """Finds the pictures of a benchmark below a folder, or takes them from its rows."""

    def __init__(self, root: str | Path | None) -> None:
        self.root = None if root is None else Path(root)
        if self.root is not None and not self.root.is_dir():
            raise DataError(f"option images: folder '{root}' does not exist; correct the path.")
        self._known: dict[str, ImageRef] = {}

    def ref(self, source: Any, name: str, where: str) -> ImageRef:
        """One picture: `source` is what the row holds, or the file names it may have."""
        known = self._known.get(name) if name else None
        if known is None:
            known = self._known[name] = self._make(source, name, where)
        return known

    def find(self, names: Sequence[str], where: str) -> Path:
        """The first of `names` that is a file below the folder."""
        if self.root is None:
            raise DataError(
                f"{where} names the image '{names[0]}' and there is no folder to look in; set the "
                "option images."
            )
        for name in names:
            try:
                path = resolve_inside(name, self.root)
            except DataError as error:
                if "does not exist" not in str(error):
                    raise DataError(f"{where}: {error}") from None
                continue
            if path.is_file():
                return path
        raise DataError(
            f"{where}: image '{names[0]}' is not in '{self.root}'; set the option images to the "
            "folder that holds it."
        )

    def _make(self, source: Any, name: str, where: str) -> ImageRef:
        if isinstance(source, Stored):
            cell = source.read()
            if isinstance(cell, bytes):
                return ImageRef(content_key(cell), partial(_open_stored, source, where), name)
            source = cell
        if isinstance(source, dict):  # a picture as `datasets` stores it
            source = source.get("bytes") or source.get("path")
        if isinstance(source, str) and len(source) > LEAST_BASE64 and "." not in source:
            source = _decode(source, where)
        if isinstance(source, bytes):
            return ImageRef(content_key(source), partial(_open_named, source, where), name)
        path = self.find([source] if isinstance(source, str) else source, where)
        return ImageRef(ImageRef.from_file(path).key, partial(_open_named, path, where), name)


class Rows(Sequence[Sample]):
    """Samples made one by one from rows: a reader says how by `read` and `picture`.

    `images` is the folder of the pictures, and null where the rows hold them or only questions are
    wanted (`without_images`, what `prior` counts).
    """

    def __init__(self, rows: Sequence[Row], images: str | Path | None, limit: int | None) -> None:
        self.rows, self.pictures = rows[:limit] if limit is not None else rows, Pictures(images)
        if images is not None:
            for index in range(0, len(rows), max(1, len(rows) // CHECKED)):
                source, _ = self.picture(index)
                if isinstance(source, list):
                    self.pictures.find(source, self.name(index))

    def read(self, index: int) -> Sample:
        """The sample of a row, all but its picture."""
        raise NotImplementedError

    def picture(self, index: int) -> tuple[Any, str]:
        """What the row holds (None: no picture, a list: possible file names), and its name."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The sample's id."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = range(len(self))[index]
        sample = self.read(index)
        source, name = self.picture(index)
        if source is not None:
            sample.images = [self.pictures.ref(source, name, f"sample '{sample.id}'")]
        sample.cluster = name or sample.id
        return sample

    @property
    def clusters(self) -> list[str]:
        """The image of every sample, without opening any."""
        return [self.picture(i)[1] or self.name(i) for i in range(len(self))]

    def without_images(self) -> Iterator[Sample]:
        """The samples for who needs question and answer alone."""
        return (self.read(index) for index in range(len(self)))


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise DataError(f"{where}: its image is neither a path nor base64; correct it.") from None


def _open_stored(source: Stored, where: str) -> Image:
    return _open_named(source.read(), where)


def _open_named(source: Any, where: str) -> Image:
    try:
        return open_image(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None

"""Image-caption pairs in the layouts people have: tables, COCO, Flickr30k, folders of classes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from triptych.data.images import open_image, resolve_inside
from triptych.data.json_rows import MAX_JSON, JsonLines
from triptych.types import DataError, ImageRef, Sample, assistant, content_key, user

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Pair = tuple[Any, str]  # a path below the image folder, or a picture's bytes, and its caption


class Captions(Sequence[Sample]):
    """Pairs from JSONL, JSON, CSV, TSV or Parquet, COCO annotations, or Flickr30k's files.

    image, caption: the columns of a table; a caption may be a list, and several rows may name one
    image. COCO (`images` and `annotations`, or Karpathy's `sentences` with its `split`) and
    Flickr30k (`NAME#K<tab>caption`, or `image_name| comment_number| comment`) are told by their
    content. Parquet may hold the pictures themselves, as {"bytes": ...}. Paths lie below `images`
    (default: the folder of `path`); up to `check` of them, evenly spread, are looked up now.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image: str = "image",
        caption: str = "caption",
        split: str | None = None,
        limit: int | None = None,
        check: int = 10_000,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"file '{path}' does not exist; set data.path (of a benchmark: samples.path) to a "
                ".jsonl, .json, .csv, .tsv, .parquet, COCO or Flickr30k caption file."
            )
        self.root = Path(images) if images is not None else self.path.parent
        if not self.root.is_dir():
            raise DataError(
                f"image folder '{self.root}' does not exist; correct data.images (of a benchmark: "
                "samples.images)."
            )
        self.pairs = list(read_pairs(self.path, image, caption, split))[:limit]
        if not self.pairs:
            raise DataError(f"file '{path}' holds no pair; give at least one image and caption.")
        for index in range(0, len(self.pairs), max(1, len(self.pairs) // max(1, check))):
            if isinstance(self.pairs[index][0], str):
                self._locate(index)
        first: dict[Any, int] = {}
        self.clusters = [
            name if isinstance(name, str) else f"{self.path.stem}/{first.setdefault(name, i)}"
            for i, (name, _) in enumerate(self.pairs)
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.pairs))[index]
        source, caption = self.pairs[index]
        name = self.clusters[index]
        if isinstance(source, bytes):
            ref = ImageRef(content_key(source), partial(open_image, source), name, drafts=True)
        else:
            path = self._locate(index)
            ref = replace(ImageRef.from_file(path), name=name)
        return _pair(ref, caption, f"{self.path.stem}/{index}", name, self.path.stem)

    def _locate(self, index: int) -> Path:
        where = f"pair {index} of '{self.path}'"
        try:
            path = resolve_inside(self.pairs[index][0], self.root)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if not path.is_file():
            raise DataError(f"{where}: image '{self.pairs[index][0]}' is no file; correct it.")
        return path


class ImageFolder(Sequence[Sample]):
    """Folders of images, one a class: DIR/golden_retriever/1.jpg is a "golden retriever".

    `target` is the class and `candidates` are all classes, for zero-shot and the linear probe; as
    training data each image has the caption of `template`. names: a file that says what folders
    such as n01440764 mean, in a line each (LOC_synset_mapping.txt) or as JSON {folder: name}.
    """

    def __init__(
        self,
        path: str | Path,
        template: str = "a photo of a {}.",
        limit: int | None = None,
        names: str | Path | None = None,
    ) -> None:
        self.root = Path(path)
        if not self.root.is_dir():
            raise DataError(
                f"'{path}' is no folder; set data.path (of a benchmark: samples.path) to one with "
                "a folder a class."
            )
        folders = sorted(f for f in self.root.iterdir() if f.is_dir() and f.name[0] != ".")
        self.classes = _class_names([folder.name for folder in folders], names)
        self.files = [
            (file, label)
            for label, folder in enumerate(folders)
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ][:limit]
        if len(self.classes) < 2 or not self.files:
            raise DataError(
                f"'{path}' holds {len(self.classes)} class folders and {len(self.files)} images; "
                "put the images of each class in a folder that is called like it."
            )
        self.template = template
        self.clusters = [str(file.relative_to(self.root)) for file, _ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self.files))[index]
        (file, label), name = self.files[index], self.clusters[index]
        path = resolve_inside(file.resolve(), self.root)
        ref = replace(ImageRef.from_file(path), name=name)
        sample = _pair(ref, self.template.format(self.classes[label]), name, name, self.root.name)
        sample.target, sample.candidates = self.classes[label], self.classes
        return sample


def _class_names(folders: Sequence[str], path: str | Path | None) -> list[str]:
    """What the folders are called: the first of a class's synonyms, all where two share it."""
    if path is None:
        return [folder.replace("_", " ") for folder in folders]
    try:
        text = Path(path).read_text(encoding="utf-8")
        given = json.loads(text) if Path(path).suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise DataError(f"option names: '{path}' cannot be read ({error}).") from None
    if given is None:
        given = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line.strip())
    elif all(isinstance(pair, list) and len(pair) == 2 for pair in given.values()):
        given = dict(given.values())  # {"0": ["n01440764", "tench"]}
    missing = [folder for folder in folders if folder not in given]
    if missing:
        raise DataError(f"option names: '{path}' says nothing of the folder '{missing[0]}'.")
    whole = [str(given[folder]).replace("_", " ").strip() for folder in folders]
    first = [name.partition(",")[0] for name in whole]
    chosen = [a if first.count(a) == 1 else b for a, b in zip(first, whole, strict=True)]
    twice = [name for name in chosen if chosen.count(name) > 1]
    if twice:
        raise DataError(f"option names: '{path}' calls two folders '{twice[0]}'; tell them apart.")
    return chosen


def read_pairs(path: Path, image: str, caption: str, split: str | None) -> Iterator[Pair]:
    """The pairs of a caption file, whatever its layout."""
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        lines = JsonLines(path)
        for i in range(len(lines)):
            yield from _from_row(lines[i], image, caption, lines.place(i))
    elif kind == ".json":
        yield from _from_json(path, image, caption, split)
    elif kind == ".parquet":
        yield from _from_parquet(path, image, caption)
    elif kind in (".csv", ".tsv", ".token", ".txt"):
        yield from _from_text(path, image, caption)
    else:
        raise DataError(
            f"'{path}' ends in '{kind}'; captions come as jsonl, json, csv, tsv, parquet."
        )


def _from_row(row: Any, image: str, caption: str, where: str) -> Iterator[Pair]:
    if not isinstance(row, dict) or image not in row or caption not in row:
        known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where} has no '{image}' and '{caption}' but {known}; name the columns with "
            "data.train.image and data.train.caption."
        )
    source, texts = row[image], row[caption]
    if isinstance(source, dict):  # a picture as the library `datasets` stores it
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str | bytes) or not source:
        raise DataError(f"{where}: '{image}' is {type(source).__name__}; give a path or bytes.")
    for text in texts if isinstance(texts, list) else [texts]:
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where}: '{caption}' is empty or no text; give words, or drop the row."
            )
        yield source, " ".join(text.split())


def _from_json(path: Path, image: str, caption: str, split: str | None) -> Iterator[Pair]:
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"'{path}' is larger than {MAX_JSON >> 30} GiB; turn it into JSONL.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"'{path}' is no valid JSON ({error}); correct it.") from None
    if isinstance(content, list):
        for i, row in enumerate(content):
            yield from _from_row(row, image, caption, f"item {i} of '{path}'")
        return
    pictures = content.get("images") if isinstance(content, dict) else None
    if not isinstance(pictures, list):
        raise DataError(f"'{path}' is neither a list of rows nor COCO's {{images, annotations}}.")
    try:
        if "annotations" in content:
            names = {picture["id"]: picture["file_name"] for picture in pictures}
            rows = [(names[a["image_id"]], a["caption"]) for a in content["annotations"]]
        else:
            rows = [
                (str(Path(p.get("filepath", "")) / p["filename"]), s["raw"])
                for p in pictures
                if split is None or str(p.get("split", "")) in split.split("+")
                for s in p["sentences"]
            ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' looks like COCO captions but lacks {error}; correct it."
        ) from None
    for i, (name, text) in enumerate(rows):
        yield from _from_row({"image": name, "caption": text}, "image", "caption", f"{path}:{i}")


def _from_text(path: Path, image: str, caption: str) -> Iterator[Pair]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        if "#0\t" in head or "#1\t" in head:  # NAME#K<tab>caption
            for number, line in enumerate(file, 1):
                name, tab, text = line.partition("\t")
                if not tab:
                    raise DataError(f"line {number} of '{path}' has no tab behind the image name.")
                row = {"image": name.rpartition("#")[0] or name, "caption": text}
                yield from _from_row(row, "image", "caption", f"line {number} of '{path}'")
            return
        marks = {"|": head.count("|"), "\t": head.count("\t"), ",": head.count(",")}
        rows = csv.reader(file, delimiter=max(marks, key=lambda mark: marks[mark]))
        names = [name.strip() for name in next(rows, [])]
        if image not in names and {"image_name", "comment"} <= set(names):  # Flickr30k
            image, caption = "image_name", "comment"
        for row in rows:
            if row:
                cells = dict(zip(names, (cell.strip() for cell in row), strict=False))
                where = f"line {rows.line_num} of '{path}'"
                yield from _from_row(cells, image, caption, where)


def _from_parquet(path: Path, image: str, caption: str) -> Iterator[Pair]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True)
    missing = [c for c in (image, caption) if c not in file.schema_arrow.names]
    if missing:
        raise DataError(
            f"'{path}' has no column '{missing[0]}' but {', '.join(file.schema_arrow.names)}; name "
            "the columns with data.train.image and data.train.caption."
        )
    at = 0
    for batch in file.iter_batches(columns=[image, caption]):
        for row in batch.to_pylist():
            yield from _from_row(row, image, caption, f"row {at} of '{path}'")
            at += 1


def _pair(ref: ImageRef, caption: str, name: str, cluster: str, source: str) -> Sample:
    messages = [user("", images=1), assistant(caption)]
    return Sample(messages, [ref], id=name, cluster=cluster, source=source)

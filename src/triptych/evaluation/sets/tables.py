"""Tables of any kind as rows: JSON, lines, TSV, CSV, Parquet, and the library `datasets`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triptych.data.json_rows import MAX_JSON, JsonLines
from triptych.types import DataError

Row = dict[str, Any]
ID = "_id"  # the key of a row in a file that is one object {id: row}


class Table(list[Row]):
    """Rows in memory; `head` holds what a JSON file says beside them (data_subtype, ...)."""

    head: Row = {}


class Stored:
    """A picture inside a table of the library `datasets`, read when it is needed."""

    def __init__(self, table: Any, index: int, column: str) -> None:
        self.table, self.index, self.column = table, index, column

    def read(self) -> bytes | str:
        """The file's bytes, or where it lies."""
        cell = self.table[self.index][self.column]
        return cell.get("bytes") or cell.get("path")


def read_table(
    source: str | Path | None,
    option: str,
    inside: Sequence[str] = (),
    split: str | None = None,
    shrink: Callable[[Row], Any] | None = None,
) -> Table:
    """The rows of a file, of a folder of the library `datasets`, or of one of its public names.

    source: .json (a list, an object that holds the list under one of `inside`, or {id: row}; also
    lines, whatever the ending), .jsonl, .tsv, .csv, .parquet; a folder with parquet shards or saved
    by `datasets`; or `datasets:NAME[:CONFIG]`. null gives no row: a training split nobody has.
    option: how errors call it. shrink: replaces each JSON object while the file is parsed.
    """
    if source is None:
        return Table()
    path = Path(source)
    if str(source).startswith("datasets:") or path.is_dir() or path.suffix.lower() == ".parquet":
        return _from_datasets(str(source), option, split)
    if not path.is_file():
        raise DataError(f"option {option}: file '{source}' does not exist; correct the path.")
    kind = path.suffix.lower()
    if kind in (".tsv", ".csv"):
        return _from_text(path, "\t" if kind == ".tsv" else ",")
    if kind in (".jsonl", ".ndjson"):
        return _lines(path, option)
    if kind != ".json":
        raise DataError(
            f"option {option}: '{source}' ends in '{kind}'; it is read from json, jsonl, tsv, csv, "
            "parquet, a folder, or datasets:NAME."
        )
    return _from_json(path, option, inside, shrink)


def _from_json(
    path: Path, option: str, inside: Sequence[str], shrink: Callable[[Row], Any] | None
) -> Table:
    if path.stat().st_size > MAX_JSON:
        raise DataError(
            f"option {option}: '{path}' is larger than {MAX_JSON >> 30} GiB; turn it into JSONL."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=shrink)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # POPE calls its lines .json
            return _lines(path, option)
        raise DataError(f"option {option}: '{path}' is no valid JSON ({error}).") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"option {option}: '{path}' cannot be parsed ({error}).") from None
    head = content if isinstance(content, dict) else {}
    rows = next((head[key] for key in inside if isinstance(head.get(key), list)), content)
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{ID: key, **row} for key, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        wanted = f" under {' or '.join(inside)}" if inside else ""
        raise DataError(f"option {option}: '{path}' holds no list of rows{wanted}; correct it.")
    table = Table(rows)
    table.head = {key: value for key, value in head.items() if not isinstance(value, list | dict)}
    return table


def _lines(path: Path, option: str) -> Table:
    lines = JsonLines(path)
    rows = Table()
    for i in range(len(lines)):
        row = lines[i]
        if not isinstance(row, dict):
            raise DataError(f"option {option}: {lines.place(i)} is no JSON object; correct it.")
        rows.append(row)
    return rows


def _from_text(path: Path, mark: str) -> Table:
    csv.field_size_limit(min(sys.maxsize, 1 << 28))  # MMBench keeps pictures in its cells
    with open(path, encoding="utf-8-sig", newline="") as file:
        return Table(dict(row) for row in csv.DictReader(file, delimiter=mark))


def _from_datasets(source: str, option: str, split: str | None) -> Table:
    import datasets

    try:
        if source.startswith("datasets:"):
            name, _, config = source.removeprefix("datasets:").partition(":")
            table = datasets.load_dataset(name, config or None, split=split or "test")
        elif Path(source).is_dir() and not list(Path(source).glob("*.parquet")):
            table = datasets.load_from_disk(source)
        else:
            files = sorted(Path(source).glob("*.parquet")) if Path(source).is_dir() else [source]
            files = [f for f in files if str(f).find(f"{split}-") >= 0] or files
            table = datasets.Dataset.from_parquet([str(file) for file in files])
        if isinstance(table, dict):
            table = table[split or next(iter(table))]
    except Exception as error:  # the library raises a dozen kinds for one missing name
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"option {option}: '{source}' cannot be loaded ({reason}).") from None
    pictures = [name for name, kind in table.features.items() if _is_picture(kind)]
    for name in pictures:
        if isinstance(table.features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    table = table.flatten_indices() if table._indices is not None else table
    rows = Table(table.remove_columns(pictures).to_list())
    for name in pictures:
        shown = table.select_columns([name])
        for index, there in enumerate(table.data.column(name).is_valid().to_pylist()):
            rows[index][name] = Stored(shown, index, name) if there else None
    return rows


def _is_picture(kind: Any) -> bool:
    return type(kind).__name__ == "Image" or (isinstance(kind, dict) and "bytes" in kind)


def field(row: Row, names: Sequence[str], where: str, default: Any = ...) -> Any:
    """The first of `names` that the row has; a row without any is refused by name."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if default is not ...:
        return default
    known = ", ".join(str(key) for key in row if key != ID)[:200]
    raise DataError(f"{where} has no '{names[0]}' but {known or 'nothing'}; check the file.")

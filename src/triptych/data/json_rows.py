"""Rows of JSON and JSONL files: one interface, memory by the byte, errors by line."""

from __future__ import annotations

import json
from array import array
from functools import partial
from pathlib import Path

from triptych.types import DataError

MAX_JSON = 1 << 30  # bytes of a .json file, which must be parsed as a whole
MAX_ROW = 1 << 26  # bytes of one line of a .jsonl file


class JsonLines:
    """The rows of a JSONL file by byte offset; blank lines are skipped.

    Opens the file for every row, so forked and spawned workers share no file position.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.numbers = array("q"), array("q")
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_ROW + 1), b""), 1):
                if len(line) > MAX_ROW:
                    raise DataError(
                        f"line {number} of '{path}' is longer than {MAX_ROW >> 20} MiB; "
                        "write one sample a line and keep pictures in files."
                    )
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self.starts.append(start)
                    self.numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> object:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return _parse(file.readline(), self.place(index))

    def place(self, index: int) -> str:
        """What messages call row `index`."""
        return f"line {self.numbers[index]} of '{self.path}'"


class JsonItems:
    """The rows of a JSON list, kept as one block of bytes instead of many small objects."""

    def __init__(self, path: Path) -> None:
        if path.stat().st_size > MAX_JSON:
            raise DataError(
                f"'{path}' is larger than {MAX_JSON >> 30} GiB; turn it into JSONL, which is read "
                "line by line (jq -c '.[]' FILE.json > FILE.jsonl)."
            )
        self.path = path
        rows = _parse(path.read_bytes(), f"'{path}'")
        if not isinstance(rows, list):
            raise DataError(f"'{path}' is no JSON list of samples; wrap them in [...].")
        self.starts, block = array("q", [0]), bytearray()
        for row in rows:
            block += json.dumps(row).encode("ascii")
            self.starts.append(len(block))
        self.block = bytes(block)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> object:
        return json.loads(self.block[self.starts[index] : self.starts[index + 1]])

    def place(self, index: int) -> str:
        """What messages call row `index`."""
        return f"item {index} of '{self.path}'"


def read_rows(path: Path) -> JsonLines | JsonItems:
    """The rows of a .jsonl (.ndjson) or .json file."""
    return JsonLines(path) if path.suffix.lower() in (".jsonl", ".ndjson") else JsonItems(path)


def _parse(text: bytes, where: str) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        at = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise DataError(f"{where} is no valid JSON ({at}); correct it.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason}); save it as UTF-8.") from None
    except (RecursionError, ValueError) as error:  # nested beyond sense, numbers of 5,000 digits
        raise DataError(f"{where} cannot be parsed ({error}); correct it.") from None

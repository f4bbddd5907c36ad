"""Multiple choice: ScienceQA and MMBench."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from triptych.evaluation.metrics.choice import CIRCULAR_STRIDE
from triptych.evaluation.sets.files import LEAST_BASE64, Rows
from triptych.evaluation.sets.tables import ID, Row, Table, field, read_table
from triptych.types import DataError, Sample, assistant, user

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


class ScienceQA(Rows):
    """`problems.json` and `pid_splits.json`, images at SPLIT/ID/image.png below `images`.

    A table with a row a question (parquet, `datasets:NAME`) is given as `problems` alone. Two of
    five questions have no picture: they are asked too, as in the published number. slices: the
    paper's NAT SOC LAN, TXT IMG NO (what stands beside the question), G1-6 G7-12.
    """

    def __init__(
        self,
        problems: str | Path | None,
        splits: str | Path | None = None,
        images: str | Path | None = None,
        split: str = "test",
        limit: int | None = None,
    ) -> None:
        rows = read_table(problems, "problems", (), split)
        if splits is not None and rows:
            known = {str(row.get(ID)): row for row in rows}
            chosen = _split_ids(Path(splits), split)
            missing = [key for key in chosen if key not in known]
            if missing:
                raise DataError(
                    f"option splits: '{splits}' names problem '{missing[0]}', which '{problems}' "
                    "does not hold; give two files of one release."
                )
            rows = Table(known[key] for key in chosen)
        else:
            rows = Table(row for row in rows if row.get("split", split) == split)
        self.split = split
        super().__init__(rows, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        options = [str(choice) for choice in field(row, ["choices"], name)]
        answer = options[int(field(row, ["answer"], name))]
        shown = row.get("image") is not None
        meta = {"hint": str(row.get("hint") or "")}
        about = ("IMG" if shown else "", "TXT" if meta["hint"] else "")
        grade = int("".join(c for c in str(row.get("grade", "")) if c.isdigit()) or 0)
        tags = [_SUBJECTS.get(str(row.get("subject")), ""), *about]
        tags += ["" if any(about) else "NO", "G1-6" if grade < 7 else "G7-12"]
        return Sample(
            [user(str(field(row, ["question"], name)), images=int(shown)), assistant(answer)],
            target=answer,
            candidates=options,
            id=name,
            source="scienceqa",
            meta=meta | {"slices": [tag for tag in tags if tag]},
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row, name = self.rows[index], self.name(index)
        image = row.get("image")
        if not isinstance(image, str):
            return image, name
        key, split = row.get(ID), row.get("split", self.split)
        return [f"{split}/{key}/{image}", f"{key}/{image}", image], name

    def name(self, index: int) -> str:
        return f"scienceqa/{field(self.rows[index], [ID, 'id'], '', index)}"


class MMBench(Rows):
    """MMBench's TSV (index, question, hint, A, B, C, D, answer, category, image in base64).

    Every question is asked once a rotation of its options (CircularEval): the copies of a file
    that holds them (index + r * 1,000,000) are used, else they are made. A cell of `image` that is
    a number names the row whose picture it shares.
    """

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        rows = read_table(path, "path", (), split)
        for number, row in enumerate(rows):
            where = f"row {number} of '{path}'"
            if str(field(row, ["answer"], where, "")).strip() not in _options(row, where):
                raise DataError(
                    f"{where} has no answer among its options; test answers are hidden, use dev."
                )
        own = {int(row["index"]): row.get("image") for row in rows}
        self.images = own
        copied = any(index >= CIRCULAR_STRIDE for index in own)
        turned = rows if copied else Table(turn for row in rows for turn in _rotations(row))
        super().__init__(turned, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        options = _options(row, name)
        question, turn = int(row["index"]) % CIRCULAR_STRIDE, int(row["index"]) // CIRCULAR_STRIDE
        answer = options[str(row["answer"]).strip()]
        hint = str(row.get("hint") or "")
        return Sample(
            [user(str(field(row, ["question"], name)), images=1), assistant(answer)],
            target=answer,
            candidates=list(options.values()),
            id=name,
            group=str(question),
            source="mmbench",
            meta={
                "hint": "" if hint == "nan" else hint,
                "rotation": turn,
                "slices": [str(row["category"])] if row.get("category") else [],
            },
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        source, owner = row.get("image"), int(row["index"])
        if isinstance(source, str) and len(source) <= LEAST_BASE64 and source.isdigit():
            owner = int(source)
            source = self.images.get(owner)
        owner %= CIRCULAR_STRIDE
        names = [f"{owner}.jpg", f"{owner}.png"]
        return source or self.images.get(owner) or names, f"mmbench/{owner}"

    def name(self, index: int) -> str:
        row = self.rows[index]
        turn, question = divmod(int(row["index"]), CIRCULAR_STRIDE)
        return f"mmbench/{question}/{turn}"


def _options(row: Row, where: str) -> dict[str, str]:
    """The options that a row really has, by letter."""
    found: dict[str, str] = {}
    for letter in string.ascii_uppercase[:8]:
        text = row.get(letter)
        if text is None or str(text).strip() in ("", "nan"):
            break
        found[letter] = str(text)
    if len(found) < 2:
        raise DataError(f"{where} has fewer than two options in its columns A, B, ...; correct it.")
    return found


def _rotations(row: Row) -> list[Row]:
    """The row as written, then with its options moved on by one place, again and again."""
    options = _options(row, f"MMBench's question {row.get('index')}")
    letters, texts = list(options), list(options.values())
    gold = letters.index(str(row["answer"]).strip())
    turns = []
    for turn in range(len(letters)):
        moved = {letters[(i + turn) % len(letters)]: text for i, text in enumerate(texts)}
        answer = letters[(gold + turn) % len(letters)]
        index = int(row["index"]) + turn * CIRCULAR_STRIDE
        turns.append(row | moved | {"answer": answer, "index": index})
    return turns


def _split_ids(path: Path, split: str) -> list[str]:
    import json

    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        return [str(key) for key in splits[split]]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"option splits: '{path}' cannot be read ({error}).") from None
    except KeyError:
        raise DataError(
            f"option splits: '{path}' has no split '{split}' but {', '.join(splits)}."
        ) from None

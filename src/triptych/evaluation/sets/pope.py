"""POPE: is there an object in the image, asked in three ways (Li et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Table, field, read_table
from triptych.types import DataError, Sample, assistant, user

SPLITS = ("random", "popular", "adversarial")


class POPE(Rows):
    """The three files coco_pope_random.json, _popular and _adversarial in the folder `path`.

    `path` may be one table that names the split of a row in `category`. Ids are SPLIT/question_id:
    answers are joined by them, never by the order of lines.
    """

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        rows = Table()
        folder = None if path is None else Path(path)
        if folder is not None and folder.is_dir() and not list(folder.glob("*.parquet")):
            for part in SPLITS:
                files = sorted(folder.glob(f"*pope_{part}.json*"))
                if len(files) != 1:
                    raise DataError(
                        f"option path: folder '{path}' holds {len(files)} files *pope_{part}.json; "
                        "keep the three of one image set."
                    )
                rows += [row | {"category": part} for row in read_table(files[0], "path")]
        else:
            rows = read_table(path, "path", (), split)
        super().__init__(rows, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        label = str(field(row, ["label", "answer"], name)).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"{name} has the label '{label}', neither yes nor no; correct it.")
        return Sample(
            [user(str(field(row, ["text", "question"], name)), images=1), assistant(label)],
            target=label,
            candidates=["yes", "no"],
            id=name,
            source="pope",
            meta={"split": str(row.get("category", "other"))},
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = field(row, ["image"], self.name(index))
        if isinstance(image, str):
            return [image, f"val2014/{image}"], f"pope/{image}"
        return image, f"pope/{row.get('image_source', index)}"

    def name(self, index: int) -> str:
        row = self.rows[index]
        return f"pope/{row.get('category', 'other')}/{row.get('question_id', index)}"

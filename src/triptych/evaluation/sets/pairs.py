"""Paired sets: which of two captions fits, Winoground and SugarCrepe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Row, Table, field, read_table
from triptych.types import DataError, Sample, assistant, user

PROMPT = "Describe the image in one sentence."


class Winoground(Rows):
    """`examples.jsonl` and the folder of its images; two samples an item, one for each image.

    candidates: both captions, in the item's order; meta["image"] is 0 or 1, `group` the item.
    meta["tag"] is the paper's collapsed tag (object, relation, both).
    """

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        prompt: str = PROMPT,
        limit: int | None = None,
    ) -> None:
        items = read_table(path, "path", (), split)
        rows = Table(item | {"side": side} for item in items for side in (0, 1))
        self.prompt = prompt
        super().__init__(rows, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        captions = [str(field(row, [f"caption_{i}"], name)) for i in (0, 1)]
        true = captions[row["side"]]
        return Sample(
            [user(self.prompt, images=1), assistant(true)],
            target=true,
            candidates=captions,
            id=name,
            group=self._item(index),
            source="winoground",
            meta={"image": row["side"], "tag": str(row.get("collapsed_tag", "other")).lower()},
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = field(row, [f"image_{row['side']}"], self.name(index))
        if isinstance(image, str):
            names = [image] + [f"{f}{image}.{end}" for f in ("", "images/") for end in _ENDS]
            return names, f"winoground/{image}"
        return image, self.name(index)

    def name(self, index: int) -> str:
        return f"{self._item(index)}/{self.rows[index]['side']}"

    @property
    def clusters(self) -> list[str]:
        """The item: its two images are no independent draws."""
        return [self._item(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = super().__getitem__(index)
        sample.cluster = sample.group
        return sample

    def _item(self, index: int) -> str:
        return f"winoground/{self.rows[index].get('id', index // 2)}"


_ENDS = ("png", "jpg")


class SugarCrepe(Rows):
    """The files add_att.json ... swap_obj.json in the folder `path`, over COCO val2017.

    candidates: the true caption and its hard negative, true first on every other row, so that a
    model with a favourite place scores one half; meta["kind"] is the file's name.
    """

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        prompt: str = PROMPT,
        limit: int | None = None,
    ) -> None:
        rows = Table()
        if path is not None:
            files = sorted(Path(path).glob("*.json"))
            if not files:
                raise DataError(
                    f"option path: '{path}' is no folder with SugarCrepe's files (add_att.json, "
                    "...); correct the path."
                )
            for file in files:
                rows += [row | {"kind": file.stem} for row in read_table(file, "path")]
        self.prompt = prompt
        super().__init__(rows, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        true = str(field(row, ["caption"], name))
        captions = [true, str(field(row, ["negative_caption"], name))]
        return Sample(
            [user(self.prompt, images=1), assistant(true)],
            target=true,
            candidates=captions if index % 2 == 0 else captions[::-1],
            id=name,
            source="sugarcrepe",
            meta={"kind": row["kind"]},
        )

    def picture(self, index: int) -> tuple[Any, str]:
        image = str(field(self.rows[index], ["filename"], self.name(index)))
        return [image, f"val2017/{image}"], f"sugarcrepe/{image}"

    def name(self, index: int) -> str:
        row: Row = self.rows[index]
        return f"sugarcrepe/{row['kind']}/{row.get('_id', index)}"

"""GQA: questions over scene graphs, one short answer each (Hudson & Manning 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import ID, field, read_table
from triptych.types import Sample, assistant, user


class GQA(Rows):
    """`testdev_balanced_questions.json` ({id: question}), images named by `imageId`.

    meta["type"] is `open` for query questions and `binary` for all others, as in the official
    script; meta["structural"] is query, verify, logical, choose or compare.
    """

    def __init__(
        self,
        questions: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(read_table(questions, "questions", (), split), images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        answer = str(field(row, ["answer"], name))
        types = row.get("types") or {}
        kind = str(types.get("structural", "") if isinstance(types, dict) else "")
        return Sample(
            [user(str(field(row, ["question"], name)), images=1), assistant(answer)],
            target=answer,
            id=name,
            source="gqa",
            meta={
                "answers": [answer],
                "type": "open" if kind == "query" else "binary" if kind else "other",
                "structural": kind,
            },
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = str(field(row, ["imageId", "image_id"], self.name(index)))
        names = [f"{image}.jpg", f"images/{image}.jpg", f"{image}.png"]
        return row.get("image", names), f"gqa/{image}"

    def name(self, index: int) -> str:
        row = self.rows[index]
        return f"gqa/{field(row, [ID, 'id', 'question_id'], f'question {index}', index)}"

"""VQAv2 and OK-VQA: questions and ten annotators' answers over COCO images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Row, field, read_table
from triptych.types import DataError, Sample, assistant, user


class VQA(Rows):
    """The two official files: `questions` and `annotations` (v2_*.json, or those of OK-VQA).

    A table that holds questions, answers and pictures in one (parquet, `datasets:NAME`) is given as
    `questions` alone. images: the folder of COCO_val2014_*.jpg, or its parent. candidates: a JSON
    list of answers, for models that rank instead of writing. meta: `answers` (the ten, of OK-VQA
    the stemmed ones), `answer_type`, `question_type`; the target is the most frequent answer.
    """

    def __init__(
        self,
        questions: str | Path | None,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        split: str | None = None,
        candidates: str | Path | None = None,
        name: str = "vqa",
        limit: int | None = None,
    ) -> None:
        asked = read_table(questions, "questions", ["questions"], split)
        noted = read_table(annotations, "annotations", ["annotations"], split, _shrink)
        self.source = name
        self.subset = str(asked.head.get("data_subtype", "val2014"))
        answers = {str(field(row, ["question_id"], "an annotation")): row for row in noted}
        self.notes = answers or {str(row.get("question_id")): row for row in asked}
        self.candidates = _answer_list(candidates)
        for row in asked[:limit]:
            key = str(row.get("question_id"))
            if not self.notes.get(key, {}).get("answers"):
                raise DataError(
                    f"question '{key}' has no answers; give the option annotations the file of "
                    "the same split (test answers are hidden: use val)."
                )
        super().__init__(asked, images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        note = self.notes[str(row["question_id"])]
        answers = [_answer(answer)[0] for answer in note["answers"]]
        given = note.get("multiple_choice_answer")
        target = str(given) if given else Counter(answers).most_common(1)[0][0]
        kind = str(note.get("answer_type") or "other").replace("/", "_")
        meta = {"answers": answers, "answer_type": kind}
        meta["question_type"] = str(note.get("question_type") or "")
        return Sample(
            [user(str(field(row, ["question"], name)), images=1), assistant(target)],
            target=target,
            candidates=self.candidates,
            id=name,
            source=self.source,
            meta=meta,
        )

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = row.get("image_id", row["question_id"])
        number = f"{int(image):012d}.jpg" if str(image).isdigit() else f"{image}.jpg"
        names = [f"{s}{number}" for s in (f"COCO_{self.subset}_", "")]
        names += [f"{self.subset}/{name}" for name in names]
        return row.get("image", names), f"{self.source}/{image}"

    def name(self, index: int) -> str:
        return f"{self.source}/{self.rows[index].get('question_id', index)}"

    def stems(self) -> Counter[tuple[str, str]]:
        """(raw word, stemmed word) as OK-VQA's annotators' answers pair them, with their counts."""
        pairs: Counter[tuple[str, str]] = Counter()
        for note in self.notes.values():
            for answer in note["answers"]:
                stem, raw = (text.lower().split() for text in _answer(answer))
                pairs.update(zip(raw, stem, strict=False) if len(raw) == len(stem) else [])
        return pairs


def _shrink(item: Row) -> Any:
    """An annotator's record as (answer, raw answer): ten of them a question are most of a file."""
    if "answer" in item and "answer_id" in item:
        return (str(item["answer"]), str(item.get("raw_answer", item["answer"])))
    return item


def _answer(answer: Any) -> tuple[str, str]:
    if isinstance(answer, dict):
        return str(answer["answer"]), str(answer.get("raw_answer") or answer["answer"])
    return answer if isinstance(answer, tuple) else (str(answer), str(answer))


def _answer_list(path: str | Path | None) -> list[str]:
    import json

    if path is None:
        return []
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"option candidates: '{path}' is no JSON list ({error}).") from None
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError(f"option candidates: '{path}' is no JSON list of two answers or more.")
    return [str(answer) for answer in answers]

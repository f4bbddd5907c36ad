"""Text in pictures: TextVQA, DocVQA and ChartQA."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Row, Table, field, read_table
from triptych.types import DataError, Sample, assistant, user


class _Questions(Rows):
    """A question, several right answers and one picture a row."""

    source = ""

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        answers = [str(answer) for answer in self.answers(row, name)]
        if not answers:
            raise DataError(f"{name} has no answers; test answers are hidden, use val.")
        target = Counter(answers).most_common(1)[0][0]
        return Sample(
            [user(self.question(row, name), images=1), assistant(target)],
            target=target,
            id=name,
            source=self.source,
            meta={"answers": answers, **self.facts(row)},
        )

    def question(self, row: Row, name: str) -> str:
        return str(field(row, ["question", "query"], name))

    def answers(self, row: Row, name: str) -> list[Any]:
        answers = field(row, ["answers", "answer", "label"], name, [])
        return list(answers) if isinstance(answers, list) else [answers]

    def facts(self, row: Row) -> dict[str, Any]:
        return {}


class TextVQA(_Questions):
    """`TextVQA_0.5.1_val.json`; its images are OpenImages, named by `image_id`, in train_images.

    ocr: `TextVQA_Rosetta_OCR_v0.2_val.json`, whose tokens then stand under the question ("Reference
    OCR token: ..."), which some models were trained with; null asks without, another benchmark.
    """

    source = "textvqa"

    def __init__(
        self,
        questions: str | Path | None,
        images: str | Path | None = None,
        ocr: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        tokens = read_table(ocr, "ocr", ["data"])
        self.tokens = {str(row.get("image_id")): row.get("ocr_tokens") or [] for row in tokens}
        super().__init__(read_table(questions, "questions", ["data"], split), images, limit)

    def question(self, row: Row, name: str) -> str:
        asked = super().question(row, name)
        if not self.tokens:
            return asked
        words = [str(word) for word in self.tokens.get(str(row.get("image_id")), [])]
        return f"{asked}\nReference OCR token: {', '.join(words)}"

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = str(field(row, ["image_id"], self.name(index)))
        names = [f"{folder}{image}.jpg" for folder in ("", "train_images/", "train_val_images/")]
        return row.get("image", names), f"textvqa/{image}"

    def name(self, index: int) -> str:
        return f"textvqa/{self.rows[index].get('question_id', index)}"


class DocVQA(_Questions):
    """`val_v1.0.json` (or _withQT) of Single-Page DocVQA; images lie at `image` (documents/*.png).

    Answers of the test split are hidden. meta["kind"] is the first of its question types.
    """

    source = "docvqa"

    def __init__(
        self,
        questions: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(read_table(questions, "questions", ["data"], split), images, limit)

    def facts(self, row: Row) -> dict[str, Any]:
        kinds = row.get("question_types") or []
        return {"kind": str(kinds[0]).replace("/", "_") if kinds else "other"}

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = field(row, ["image"], self.name(index))
        if isinstance(image, str):
            return [image, image.rpartition("/")[2]], f"docvqa/{image.rpartition('/')[2]}"
        page = (str(row[k]) for k in ("docId", "ucsf_document_page_no") if row.get(k) is not None)
        return image, f"docvqa/{'/'.join(page) or index}"

    def name(self, index: int) -> str:
        return f"docvqa/{field(self.rows[index], ['questionId', 'question_id'], '', index)}"


class ChartQA(_Questions):
    """`test_human.json` and `test_augmented.json` in the folder `path`, images in its png/.

    A file (parquet, `datasets:NAME`) that holds both parts is read too. meta["part"] is human or
    augmented.
    """

    source = "chartqa"

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        split: str = "test",
        limit: int | None = None,
    ) -> None:
        files = [] if path is None else [Path(path) / f"{split}_{part}.json" for part in _PARTS]
        if any(file.is_file() for file in files):
            rows = Table()
            for part, file in zip(_PARTS, files, strict=True):
                rows += [row | {"type": part} for row in read_table(file, "path")]
            images = Path(str(path)) / "png" if images is None else images
        elif path is not None and Path(path).is_dir() and not list(Path(path).glob("*.parquet")):
            raise DataError(
                f"option path: folder '{path}' holds no {split}_human.json; give the folder of a "
                "split of ChartQA."
            )
        else:
            rows = read_table(path, "path", (), split)
        super().__init__(rows, images, limit)

    def facts(self, row: Row) -> dict[str, Any]:
        part = str(row.get("type", row.get("human_or_machine", "other")))
        known = {"0": "human", "1": "augmented", "human_test": "human"}
        return {"part": known.get(part, part.removesuffix("_test"))}

    def picture(self, index: int) -> tuple[Any, str]:
        row = self.rows[index]
        image = field(row, ["image", "imgname"], self.name(index))
        if isinstance(image, str):
            return [image, f"png/{image}"], f"chartqa/{image}"
        return image, f"chartqa/row {index}"

    def name(self, index: int) -> str:
        return f"chartqa/{self.facts(self.rows[index])['part']}/{index}"


_PARTS = ("human", "augmented")

"""A user's own questions: JSON or JSONL in the layouts of instruction data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from triptych.data.readers import Instructions
from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.parsers import exact_answer
from triptych.evaluation.scorers import Scorer
from triptych.evaluation.similarity import Similarity
from triptych.evaluation.wording import Ask, Rank
from triptych.types import DataError


class JsonlBenchmark(AnswerBenchmark):
    """Exact-match accuracy on the rows of a file; the last answer of a dialogue is the gold one.

    path, images: as `data=instructions` takes them (`messages`, `conversations` or `text`; paths
    below `images`, by default the file's folder). train: a file of the same layout, for `prior`. A
    row may hold `candidates`, its closed list of answers, and plain fields; `slice_by` names one.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        train: str | Path | None = None,
        slice_by: str | None = None,
        parser: Callable[[str, Sequence[str]], str | None] = exact_answer,
        instruction: str = "",
        max_new_tokens: int = 32,
        scorers: Sequence[Scorer] | None = None,
        blind_subset: str | None = None,
    ) -> None:
        for option, file in (("path", path), ("train", train)):
            if file is not None and not Path(file).is_file():
                raise DataError(f"option {option}: file '{file}' does not exist; correct the path.")
        if images is not None and not Path(images).is_dir():
            raise DataError(f"option images: folder '{images}' does not exist; correct the path.")
        ways = [
            Ask(max_new_tokens, instruction=instruction),
            Rank(instruction=instruction),
            Similarity(),
        ]
        super().__init__(
            Instructions(path, images),
            None if train is None else Instructions(train, images),
            slice_by,
            parser,
            max_new_tokens,
            scorers or ways,
            blind_subset,
        )

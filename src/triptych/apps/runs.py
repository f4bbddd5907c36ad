"""Runs in one table: `python -m triptych.apps.runs multirun/2026-01-31/12-00-00`.

Each argument is a run or a folder with runs below it, such as what a sweep leaves. Metrics of one
name stand together, with how they were scored and their baselines beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from triptych.evaluation.records import Results, runs_table
from triptych.types import TriptychError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; a mistake of the user's is one sentence and exit code 1."""
    folders = list(sys.argv[1:] if argv is None else argv)
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: python -m triptych.apps.runs FOLDER [FOLDER ...]\n\n" + (__doc__ or ""))
        return 0 if folders else 2
    try:
        print(runs_table(find_results(folders)))
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def find_results(folders: Sequence[str | Path]) -> dict[str, Results]:
    """The results of all runs below the folders, by the part of their path that differs."""
    found: dict[Path, Results] = {}
    for folder in map(Path, folders):
        files = [f for f in sorted(folder.rglob("results.json")) if f.parent.name != "before"]
        if not files:
            raise TriptychError(
                f"'{folder}' holds no results.json; name a scored run, or a folder of runs."
            )
        for file in files:
            try:
                found[file.parent.resolve()] = {"metrics": json.loads(file.read_text())["metrics"]}
            except (ValueError, KeyError, TypeError):
                raise TriptychError(
                    f"'{file}' holds no results; score that run again with evaluate.py."
                ) from None
    names = list(found)
    shared = 0
    while len(names) > 1 and len({p.parts[: shared + 1] for p in names}) == 1:
        shared += 1
    return {
        "/".join(path.parts[shared:] if len(names) > 1 else path.parts[-1:]): results
        for path, results in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())

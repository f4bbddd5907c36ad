"""Several models on one card: `python -m triptych.evaluation.card RUN RUN [before=RUN] [out=DIR]`.

Each RUN is a run or evaluation directory scored with `benchmark=[card]`. `before` names the model
that the others were tuned from: what they forgot is a table of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from triptych.options import run_tool
from triptych.types import TriptychError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one sentence if something is missing."""
    return run_tool(_run, __doc__, argv)


def _run(words: Sequence[str]) -> int:
    from triptych.evaluation.card.write import rows_of, write_card

    options = dict(w.split("=", 1) for w in words if w.startswith(("before=", "out=")))
    folders = [Path(w) for w in words if not w.startswith(("before=", "out="))]
    if not folders:
        raise TriptychError("name one or more run directories.")
    before = Path(options["before"]) if "before" in options else None
    files = write_card(rows_of(folders, before), Path(options.get("out", "card")))
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate a run or a preset: `python evaluate.py run=runs/mine`."""

from __future__ import annotations

from triptych.evaluation.__main__ import main

if __name__ == "__main__":
    main()

"""Runs in one table: what a sweep leaves, with scorers and baselines."""

from __future__ import annotations

import json
from pathlib import Path

from triptych.apps.runs import find_results, main


def leave(folder: Path, **metrics: dict) -> None:
    folder.mkdir(parents=True)
    named = {name.replace("_", "/"): entry for name, entry in metrics.items()}
    (folder / "results.json").write_text(json.dumps({"metrics": named}))


def test_metrics_of_one_name_stand_together(tmp_path, capsys):
    common = {"low": 0.4, "high": 0.6, "n": 60, "prior": 0.67, "blind": 0.25, "chance": 0.2}
    leave(tmp_path / "clip", vqa_accuracy={"value": 0.5, "scorer": "similarity", **common})
    leave(tmp_path / "clip" / "before", vqa_accuracy={"value": 0.1, **common})
    leave(
        tmp_path / "llava",
        vqa_accuracy={"value": 0.6, "scorer": "generate", **common},
        other_recall={"value": 0.125, "n": 3},
    )
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = "vqa/accuracy  clip   similarity  60  50.00 [40.00, 60.00]  67.00  25.00   20.00"
    assert lines[2].split() == first.split() and len(lines) == 5
    assert lines[3].split()[:3] == ["vqa/accuracy", "llava", "generate"]
    assert lines[4].split() == ["other/recall", "llava", "-", "3", "12.50", "-", "-", "-"]
    assert list(find_results([tmp_path / "clip"])) == ["clip"]


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "holds no results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("[]")
    assert main([str(tmp_path)]) == 1
    assert "score that run again" in capsys.readouterr().err

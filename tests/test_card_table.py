"""The card over several models: rows, licences, change against a baseline, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_card import Knows, benchmarks

from triptych.evaluation.card.__main__ import main
from triptych.evaluation.card.facts import LICENCES, licence_of, model_facts
from triptych.evaluation.card.table import CARD_FILE, compare_rows, markdown, page, read_row
from triptych.evaluation.card.write import after_evaluation, rows_of, scored
from triptych.evaluation.runner import evaluate
from triptych.types import TriptychError


def evaluated(folder: Path, model: Knows, **facts: object) -> Path:
    evaluate(model, benchmarks(6), folder, blind="none", progress=False)
    facts = {"label": folder.name, "family": "x", "parameters": 2_500_000, **facts}
    facts = {"licence": "Apache-2.0", "openness": "open", "weights": {}} | facts
    (folder / CARD_FILE).write_text(json.dumps(facts))
    return folder


def forgets(sample) -> str:
    """Right but for relations, where it always says yes."""
    return "yes" if sample.meta["kind"] == "relation" else str(sample.target)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("cards")
    return (
        evaluated(place / "before", Knows("generate")),
        evaluated(place / "after", Knows("generate", says=forgets)),
        evaluated(place / "ranks", Knows("loglikelihood", "sentences"), label="a|b <script>"),
    )


def test_a_card_has_a_row_a_model_with_its_licence(folders):
    rows = rows_of(folders)
    lines = markdown(rows).splitlines()
    head = next(line for line in lines if line.startswith("| model | generation"))
    assert head.count("|") == 12
    table = [line for line in lines if line.startswith("| before |")]
    assert "100.0 [" in table[0] and "2.5 M | Apache-2.0 | open |" in table[0]
    other = next(line for line in lines if line.startswith(r"| a\|b &lt;script&gt;"))
    assert "n/a" in other and "loglikelihood" in other, "it writes no captions"
    shown = page(rows, "data:,")
    assert "<script>" not in shown and "a|b &lt;script&gt;" in shown


def test_forgetting_is_a_paired_difference_with_its_interval(folders):
    before, after, ranks = (read_row(folder) for folder in folders)
    changes = compare_rows(before, after)
    assert set(changes) == {
        "generation", "reading", "counting", "comparison", "relation", "retrieval", "hallucination"
    }  # fmt: skip
    relation = changes["relation"]
    assert relation.difference == pytest.approx(-0.5) and relation.high < 0 and relation.n == 18
    assert changes["counting"].difference == 0 and changes["counting"].p == 1.0
    assert compare_rows(before, ranks) == {}, "another scorer does not compare"
    rows = rows_of([folders[1]], before=folders[0])
    assert [row.baseline for row in rows] == [True, False]
    change = next(line for line in markdown(rows).splitlines() if "| relation | -50.0 [" in line)
    assert change.endswith("| forgotten |")


def test_a_run_scored_before_training_is_its_own_baseline(folders, tmp_path):
    import shutil

    run = tmp_path / "mine"
    shutil.copytree(folders[1], run)
    shutil.copytree(folders[0], run / "before")
    rows = rows_of([run])
    assert [row.label for row in rows] == ["after (before)", "after"]
    assert rows[1].changes["relation"].high < 0
    later = run / "eval" / "0a"
    shutil.copytree(folders[1], later)
    (run / CARD_FILE).unlink()
    assert scored(run) == later and len(rows_of([run])) == 2


def test_the_command_writes_table_and_plot(folders, tmp_path, capsys):
    out = tmp_path / "card"
    assert main([*map(str, folders), f"out={out}"]) == 0
    assert {p.name for p in out.iterdir()} == {"card.md", "card.html", "card.png"}
    assert (out / "card.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png;base64," in (out / "card.html").read_text()
    assert str(out / "card.md") in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "holds no results.json" in capsys.readouterr().err


def test_other_benchmarks_stand_beside(folders, tmp_path):
    results = json.loads((folders[0] / "results.json").read_text())
    results["metrics"]["pope/f1"] = {"value": 0.71, "n": 9, "low": 0.6, "high": 0.8}
    (tmp_path / "results.json").write_text(json.dumps(results))
    shown = markdown([read_row(tmp_path)])
    assert "| model | pope/f1 |" in shown and "71.0 [60.0, 80.0]" in shown
    results["metrics"] = {"pope/f1": results["metrics"]["pope/f1"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(TriptychError, match="not scored on the card"):
        read_row(tmp_path)


def test_facts_name_the_weights_and_the_worst_openness(tmp_path):
    cfg = OmegaConf.create(
        {
            "model": {
                "name": "llava",
                "vision": {"weights": "openai/clip-vit-large-patch14-336"},
                "language": {"weights": "lmsys/vicuna-7b-v1.5", "tokenizer": "x"},
                "connector": {"depth": 2},
            }
        }
    )
    facts = model_facts(cfg, "mine", 7)
    assert list(facts["weights"]) == ["vision", "language"]
    assert facts["licence"] == "MIT; Llama 2 Community Licence"
    assert facts["openness"] == "restricted"
    assert model_facts(OmegaConf.create({"model": {"name": "clip"}}), "c")["openness"] == "open"
    api = OmegaConf.create({"model": {"name": "gpt4v", "id": "gpt-4-turbo-2024-04-09"}})
    assert model_facts(api, "api")["openness"] == "closed"
    assert licence_of("nobody/knows").openness == "unknown"
    assert licence_of("Salesforce/blip2-opt-2.7b").openness == "restricted", "the longest wins"
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# card")
    assert licence_of(str(tmp_path)) == ("mit", "open")
    (tmp_path / "README.md").write_text("---\nlicense: my-own-terms\n---\n")
    assert licence_of(str(tmp_path)).openness == "restricted"
    assert all(licence.openness != "unknown" for licence in LICENCES.values())


def test_an_evaluation_on_the_card_leaves_its_own(folders, tmp_path, capsys):
    import shutil

    run = tmp_path / "tuned"
    shutil.copytree(folders[0], run)
    (run / CARD_FILE).unlink()
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    cfg = OmegaConf.create(
        {"model": {"name": "llava", "vision": {"weights": "assets/tiny/vision"}}}
    )
    after_evaluation(cfg, Knows("generate"), run, {"easy_vqa/accuracy": {"value": 1.0}})
    assert not (run / CARD_FILE).exists(), "nothing of the card was scored"
    after_evaluation(cfg, Knows("generate"), run, metrics)
    assert read_row(run).label == "tuned"
    assert "Apache-2.0 (this project)" in (run / "card.md").read_text()
    assert "Capability card: " in capsys.readouterr().out

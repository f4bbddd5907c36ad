"""The look at a data set: every kind of mistake is found and named, and good data pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data import check
from triptych.data.inspection import Finding, Inspection, inspect, runs

GOOD = [
    {"id": f"g{i}", "image": f"{i}.png", "text": f"User: what color is it?\nAssistant: {word}"}
    for i, word in enumerate(("red", "blue", "green"))
]
LISTED = {"text": "User: yes or no?\nAssistant: maybe", "candidates": ["yes", "no"]}
BAD = {
    "unreadable": {"image": "cut.png", "text": "User: what?\nAssistant: red"},
    "refused": {"image": "0.png", "messages": [{"role": "user", "content": "say \ue000"}]},
    "repeated": GOOD[0],
    "contradiction": {**GOOD[0], "text": "User: what color is it?\nAssistant: teal"},
    "unsplit turns": {"image": "1.png", "text": "User: what?\nAssistant: red Human: and this?"},
    "template marks": {"image": "1.png", "text": "User: where to?\nAssistant: there</s>"},
    "broken encoding": {"image": "1.png", "text": "User: where?\nAssistant: cafÃ©"},
    "empty turn": {"image": "1.png", "text": "User: a?\nAssistant: b\nUser:\nAssistant: c"},
    "outside its list": {"image": "1.png", **LISTED},
    "thin picture": {"image": "thin.png", "text": "User: this?\nAssistant: red"},
    "small picture": {"image": "small.png", "text": "User: this one?\nAssistant: red"},
    "cut": {"image": "2.png", "text": "User: tell.\nAssistant: " + "a circle " * 60},
}
BAD["refused"]["messages"].append({"role": "assistant", "content": "yes"})
BAD["unsplit turns"]["text"] = "User: what?\nAssistant: red\nHuman: and this?"


@pytest.fixture
def folder(tmp_path) -> Path:
    made = np.random.default_rng(0)
    sizes = {"0": (64, 64), "1": (64, 64), "2": (64, 64), "thin": (64, 400), "small": (9, 9)}
    for name, size in sizes.items():
        pixels = made.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def run(folder: Path, rows: list[dict], *words: str) -> tuple[int, dict]:
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["data=instructions", f"data.path={folder}/mine.jsonl", f"out={folder}/out"]
    code = check.main([*options, "data.max_length=80", *words])
    return code, json.loads((folder / "out/check.json").read_text())


def test_every_kind_of_mistake_is_found_and_its_sample_named(folder, capsys):
    rows = [*GOOD, *({**row, "id": kind} for kind, row in BAD.items())]
    code, facts = run(folder, rows)
    assert code == 1 and facts["stops"]
    assert set(facts["findings"]) == set(BAD)
    for kind, found in facts["findings"].items():
        assert any(kind in entry["sample"] or kind in entry["says"] for entry in found), kind
    assert facts["samples"] == len(rows)
    printed = capsys.readouterr().out
    assert "STOPS A RUN  unreadable: 1" in printed and "look at      contradiction: 1" in printed
    assert "'red' and 'teal'" in printed


def test_one_bad_row_hides_no_other(folder):
    rows = [{"image": "0.png"}, GOOD[0], {"text": "User: a?"}, {"image": "../x", **LISTED}]
    code, facts = run(folder, rows)
    assert code == 1 and facts["samples"] == 4
    said = [entry["says"] for entry in facts["findings"]["unreadable"]]
    assert [line in text for line, text in zip(("line 1", "line 3", "line 4"), said, strict=True)]
    assert len(said) == 3


def test_good_data_pass_and_are_counted(folder, capsys):
    code, facts = run(folder, GOOD)
    assert code == 0 and not facts["findings"]
    assert facts["samples"] == facts["images"] == 3
    assert facts["tokens_with_loss"]["most"] < facts["tokens"]["median"] <= facts["tokens"]["most"]
    assert "nothing to complain about" in capsys.readouterr().out


def test_an_answer_that_outweighs_all_others_is_said(folder):
    rows = [
        {"image": f"{i % 3}.png", "text": f"User: is there a {i}?\nAssistant: {word}"}
        for i, word in enumerate(["no"] * 14 + ["yes"] * 8)
    ]
    _, facts = run(folder, rows)
    (found,) = facts["findings"]["one answer"]
    assert "'no' is 64 %" in found["says"]


def test_the_page_colours_what_is_learned_and_escapes_the_rest(folder):
    row = {"id": "<b>x</b>", "image": "0.png", "text": "User: <i>what?</i>\nAssistant: a circle"}
    run(folder, [row])
    page = (folder / "out/check.html").read_text()
    assert "<i>what?" not in page and "&lt;i&gt;what?" in page and "<b>x" not in page
    learned = page.partition('class="learned" title=')[2]
    assert "circle" in learned[:80] and "&lt;|" in learned[:80]  # the stop token with it
    assert "image tokens]</span>" in page and "data:image/png;base64" in page


def test_runs_hold_every_token_once(vlm, dialogue):
    processor = vlm.processor()
    encoded = processor.encode(dialogue(("what color?", "red"), ("is it?", "yes")))
    found = list(runs(encoded))
    assert [kind for kind, _ in found] == ["read", "image", "read", "learned", "read", "learned"]
    assert [i for _, ids in found for i in ids] == encoded.prefix + encoded.ids
    learned = [i for kind, ids in found for i in ids if kind == "learned"]
    assert processor.tokenizer.decode(learned) == "red<|end|>yes<|end|>"


def test_a_template_without_a_stop_token_in_its_answers_is_noticed(vlm, dialogue):
    processor = vlm.processor()
    template = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = template.replace(
        "{{ m.content }}<|end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|end|>"
    )
    found = inspect([dialogue(("what?", "red"))], processor, progress=False)
    assert [finding.kind for finding in found.findings] == ["no stop token"]


def test_captions_are_counted_as_the_text_tower_reads_them(folder, capsys):
    rows = [{"image": "0.png", "caption": "a circle"}, {"image": "1.png", "caption": "red " * 90}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["data=captions", f"data.path={folder}/pairs.jsonl", f"out={folder}/out"]
    assert check.main(["model=clip", *options]) == 0
    facts = json.loads((folder / "out/check.json").read_text())
    assert list(facts["findings"]) == ["cut"] and facts["samples"] == 2
    assert "the text tower reads" in facts["findings"]["cut"][0]["says"]


def test_half_an_emoji_is_refused_by_name_and_can_be_printed(folder, capsys):
    row = {"id": "half", "image": "1.png", "text": "User: \ud83d?\nAssistant: \ud83d red"}
    code, facts = run(folder, [row, {**row, "text": row["text"] + "!"}])
    assert code == 1
    assert "half of a character" in facts["findings"]["refused"][0]["says"]
    assert "mine/0:half" in capsys.readouterr().out
    assert "contradiction" in (folder / "out/check.html").read_text(encoding="utf-8")


def test_several_captions_of_an_image_contradict_nothing(pictures):
    from triptych.types import Sample, assistant, user

    samples = [
        Sample([user("", images=1), assistant(text)], [pictures[0]], id=text)
        for text in ("a circle", "a red circle")
    ]
    assert not inspect(samples, Words(), progress=False).findings


class Words:
    """A processor whose rows are of no kind that can be counted."""

    max_length = 10

    def rows(self, rows):
        from triptych.types import Batch

        return Batch(None, None, {}, [])


def test_rows_of_other_processors_are_counted_by_their_batches(folder):
    assert check.main(["model=oscar", "data=easy_vqa", "most=4", f"out={folder}"]) == 0
    facts = json.loads((folder / "check.json").read_text())
    assert facts["tokens"]["most"] > facts["tokens_with_loss"]["most"] >= 2


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl"])
def test_a_librarys_own_processor_is_looked_through(name, folder, tmp_path_factory):
    import tiny_hosted

    model = tiny_hosted.build_all(tmp_path_factory.mktemp("hosted"))[name]
    code, facts = run(folder, GOOD, "model=hf", f"model.id={model}", "data.max_length=20")
    assert code == 0 and list(facts["findings"]) == ["cut"]
    page = (folder / "out/check.html").read_text()
    assert "image tokens]</span>" in page and 'class="learned"' in page


def test_findings_that_stop_come_first():
    found = Inspection(findings=[Finding("cut", "a"), Finding("cut", "b"), Finding("refused", "c")])
    assert list(found.kinds()) == ["refused", "cut"] and found.stops
    assert not Inspection(findings=[Finding("cut", "a")]).stops


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=instructions"], "data.path"),
        (["data=easy_vqa", "most=few"], "most=few must be a number"),
        (["data=easy_vqa", "data.batch=3"], "data.batch"),
        (["data=webdataset", "model=clip", "data.path=/nowhere"], "is a stream"),
    ],
)
def test_wrong_options_are_one_sentence(words, says, capsys):
    assert check.main(words) == 2
    assert says in capsys.readouterr().err


def test_the_module_runs_on_the_data_that_ship(tmp_path):
    words = ["data=easy_vqa", "most=300", f"out={tmp_path}"]
    command = [sys.executable, "-m", "triptych.data.check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "300 samples over" in done.stdout

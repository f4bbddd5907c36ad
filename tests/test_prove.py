"""The proofs a user can run: they hold for the models that ship, and fail where something leaks."""

from __future__ import annotations

import pytest

from triptych.apps import prove
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.parts import flat_rows

FEW = ["data=easy_vqa", "rows=2"]


def claims(words: list[str]) -> dict[str, prove.Proof]:
    return {proof.claim: proof for proof in prove.prove(words)}


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_the_default_model_holds_every_claim(peft):
    found = claims(["model=llava", f"peft={peft}", *FEW])
    assert len(found) == 4
    assert all(proof.difference is not None and proof.holds for proof in found.values()), found


def test_contrastive_towers_hold_theirs():
    found = claims(["model=clip", "rows=6"])
    assert [c.split()[0] for c in found] == ["towers", "vectors", "vectors"]
    assert all(proof.difference is not None and proof.holds for proof in found.values()), found


def test_samples_that_see_each_other_fail(monkeypatch, capsys):
    def leaking(segments, first):
        return [flat_rows.Part(len(segments), (first,), None)]  # causal over the whole row

    monkeypatch.setattr(flat_rows, "_row_parts", leaking)
    assert prove.main(["model=llava", "peft=lora", *FEW]) == 1
    printed = capsys.readouterr().out
    assert "FAILS  samples that share a row" in printed
    assert "holds  cached features" in printed


def test_answers_that_follow_the_batch_fail(monkeypatch):
    monkeypatch.setattr(
        ModelPredictor, "generate", lambda self, s, **_: [str(self.batch_size)] * len(s)
    )
    found = claims(["model=llava", "peft=lora", *FEW])
    proof = found["answers alone are those in a batch"]
    assert not proof.holds and "8 of 8 differ" in str(proof)


def test_what_cannot_be_compared_says_why():
    found = claims(["model=blip", "rows=2"])
    assert "momentum teacher" in str(found["training steps"])
    assert found["vectors of images alone are those in a batch"].holds


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=llava", "rows=1"], "rows=1 must be a number from 2"),
        (["model=llava", "device=abacus"], "device=abacus is not there"),
        (["model=llava", "data.bath_size=3"], "data.bath_size"),
    ],
)
def test_wrong_options_are_one_sentence(words, says, capsys):
    assert prove.main(words) == 2
    assert says in capsys.readouterr().err

"""Interleaved rows: solved samples on other images in front of the question."""

from __future__ import annotations

import pytest

from triptych.bundle import compose_preset
from triptych.data.few_shot import FewShot
from triptych.evaluation.command import build_benchmarks
from triptych.types import DataError


@pytest.fixture
def reader(dialogue):
    return [dialogue((f"what is {i}?", "red"), images=(i,), name=str(i)) for i in range(4)]


def test_k_solved_samples_stand_in_front_each_with_its_image(reader):
    shown = FewShot(reader, shots=[2])[1]
    assert len(shown.images) == 3 and len(shown.messages) == 6
    assert shown.images[-1].key == reader[1].images[0].key
    assert len({ref.key for ref in shown.images}) == 3  # never the image that is asked about
    assert shown.prompt == shown.messages[:-1]
    assert FewShot(reader, shots=[2])[1] == shown  # a function of index and seed
    assert shown.cluster == reader[1].cluster


def test_zero_shots_are_the_sample_and_too_many_are_refused(reader):
    assert FewShot(reader, shots=[0])[2] == reader[2]
    with pytest.raises(DataError, match="no 4 solved samples"):
        FewShot(reader, shots=[4])[0]
    with pytest.raises(DataError, match="from 0 on"):
        FewShot(reader, shots=[-1])


def test_shots_come_from_the_support_and_vary(reader):
    few = FewShot(reader[:1], shots=[1], support=reader[1:])
    assert few[0].messages[0] in [s.messages[0] for s in reader[1:]]
    counts = {len(FewShot(reader, shots=[0, 1, 2], seed=s)[0].images) for s in range(12)}
    assert counts == {1, 2, 3}
    assert FewShot(reader).clusters == [s.cluster for s in reader]


def test_one_name_asks_at_all_four_numbers_of_shots():
    cfg = compose_preset("flamingo", ["benchmark=[few_shots]"])
    made, _ = build_benchmarks(cfg.benchmark)
    assert list(made) == [f"few_shot_{k}" for k in (0, 2, 4, 8)]
    asked = [made[f"few_shot_{k}"].samples for k in (0, 2, 4, 8)]
    assert [len(samples) for samples in asked] == [1000] * 4
    assert [len(samples[7].images) for samples in asked] == [1, 3, 5, 9]
    assert len({samples[7].id for samples in asked}) == 1, "the same questions"

"""Several data sets read as one: shares, passes, the same again, and a weight for each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from triptych.build import build, build_data, build_model, build_objective
from triptych.bundle import compose_preset
from triptych.cli import conf_dir
from triptych.config_check import check_overrides
from triptych.data.datamodule import DataModule
from triptych.data.mixture import Mixture, divide
from triptych.data.rows import RowPlan, RowSampler, SpreadPlan
from triptych.objectives.tokens import NextToken
from triptych.types import DataError, Sample


def reader(name: str, size: int, per_image: int = 1) -> list[Sample]:
    return [
        Sample([], id=str(i), cluster=f"{i // per_image}", source=f"file of {name}")
        for i in range(size)
    ]


def drawn(mixture: Mixture) -> dict[str, Counter]:
    found: dict[str, Counter] = {name: Counter() for name in mixture.sets}
    for sample in mixture:
        assert sample.id.partition("/")[0] == sample.source
        found[sample.source][sample.id] += 1
    return found


def test_in_proportion_to_size_each_sample_comes_once():
    found = drawn(Mixture({"a": reader("a", 3), "b": reader("b", 12)}))
    assert {n: set(c.values()) for n, c in found.items()} == {"a": {1}, "b": {1}}
    assert [len(c) for c in found.values()] == [3, 12]


@pytest.mark.parametrize(
    ("shares", "size", "expected"),
    [
        ("root", 600, [100, 200, 300]),  # of 4, 16 and 36: 2 : 4 : 6
        ("equal", 30, [10, 10, 10]),
        ({"a": 1, "b": 0.5, "c": 2.5}, 40, [10, 5, 25]),
        ("size", None, [4, 16, 36]),
        ("equal", 32, [11, 11, 10]),  # 10.67 each: the largest remainders, the first sets on a tie
    ],
)
def test_shares_are_exact(shares, size, expected):
    sets = {"a": reader("a", 4), "b": reader("b", 16), "c": reader("c", 36)}
    found = drawn(Mixture(sets, shares, size))
    assert [sum(c.values()) for c in found.values()] == expected
    for name, counts in found.items():  # no sample twice before all came once
        few, rest = divmod(sum(counts.values()), len(sets[name]))
        often = Counter({few + 1: rest, few: len(sets[name]) - rest})
        assert Counter(counts[f"{name}/{i}"] for i in range(len(sets[name]))) == +often


def test_root_shares_of_instructblip_within_two_per_cent():
    """Held-in sets differ a hundredfold; frequencies match sqrt(S) but for one sample."""
    sizes = [566_747, 82_783, 17_056, 34_602, 9_009, 443_757, 157_712]
    roots = [s**0.5 for s in sizes]
    counts = divide(1_000_000, roots)
    assert sum(counts) == 1_000_000
    for count, root in zip(counts, roots, strict=True):
        assert abs(count - 1_000_000 * root / sum(roots)) < 1
        assert abs(count / 1_000_000 / (root / sum(roots)) - 1) < 0.02


def test_the_seed_decides_what_is_drawn_and_in_which_order():
    sets = {"a": reader("a", 50), "b": reader("b", 50)}

    def ids(seed: int) -> list[str]:
        return [s.id for s in Mixture(sets, "equal", 40, seed=seed)]

    assert ids(3) == ids(3) and ids(3) != ids(4)
    assert len(set(ids(3))) == 40
    turned = Mixture(dict(reversed(sets.items())), "equal", 40, seed=3)
    assert {n: turned.counts[n] for n in sets} == {"a": 20, "b": 20}


def test_rows_hold_one_image_of_one_set_and_no_sample_twice():
    """Both sets name their images alike, and the small one is read five times."""
    mixture = Mixture({"a": reader("a", 8, 4), "b": reader("b", 40, 4)}, "equal", 80)
    plan = RowPlan(mixture, samples_per_row=16, draw=None, seed=1)
    assert sum(len(row) for row in plan.rows(0)) == 80
    for row in plan.rows(0):
        samples = [mixture[i] for i in row]
        assert len({s.source for s in samples}) == len({s.cluster for s in samples}) == 1
        assert len({s.id for s in samples}) == len(samples) == 4


def test_an_image_that_is_read_again_is_no_wrong_pair_of_itself():
    mixture = Mixture({"a": reader("a", 4), "b": reader("b", 60)}, "equal", 64)
    sampler = RowSampler(SpreadPlan(mixture, 1, None, seed=0), 8)
    for batch in sampler:
        names = [mixture[i].id for (i,) in batch]
        assert len(set(names)) == len(names)


def test_a_draw_of_each_image_would_undo_the_shares():
    with pytest.raises(DataError, match="data.draw.*undo the shares"):
        RowPlan(Mixture({"a": reader("a", 4)}), 1, 2, seed=0)


def test_a_resumed_run_reads_on_where_it_stopped(vlm, dialogue):
    """The same batches behind the third, with the counts of their windows."""
    one = [dialogue((f"what is {i}?", "red"), images=(i,), name=str(i)) for i in range(4)]
    two = [dialogue((f"where is {i}?", "a blue square"), images=(i,), name="s") for i in range(3)]

    def loader(state=None):
        mixture = Mixture({"one": one, "two": two}, {"one": 3, "two": 1}, 16, seed=5)
        objective = NextToken(weights={"one": 1.0, "two": 0.2})
        data = DataModule(mixture, vlm.processor(), objective, batch_size=2, accumulate=2, seed=5)
        if state:
            data.load_state_dict(state)
        return [([s.id for s in b.samples], b.totals) for b in data.train_dataloader()]

    whole = loader()
    assert Counter(i.partition("/")[0] for ids, _ in whole for i in ids) == {"one": 12, "two": 4}
    assert loader({"epoch": 0, "batch": 4, "batch_size": 2}) == whole[4:]
    assert loader({"epoch": 1, "batch": 0, "batch_size": 2}) != whole


def test_the_weights_of_the_sets_reach_the_loss(vlm, dialogue):
    """By hand: 1.0 x the mean over set one's tokens + 0.2 x the mean over set two's."""
    sets = {
        "one": [dialogue(("what?", "red"), name="x")],
        "two": [
            dialogue(("what?", "a blue square"), images=(1,), name="x"),
            dialogue(("is it?", "no"), images=(2,), name="y"),
        ],
    }
    weights = {"one": 1.0, "two": 0.2}
    processor, plain, objective = vlm.processor(), NextToken(), NextToken(weights=weights)
    data = DataModule(Mixture(sets), processor, objective, batch_size=3)
    (batch,) = data.train_dataloader()
    data = DataModule(Mixture(sets), processor, objective, batch_size=1, accumulate=3)
    window = list(data.train_dataloader())  # each micro-batch lacks a set
    assert len(window) == 3
    vlm.eval()
    with torch.no_grad():
        by_hand = 0.0
        for name, samples in sets.items():
            rows = [processor.collate([replace(s, source=name)]) for s in samples]
            nll = sum(plain(vlm, row)["next_token"].sum for row in rows)
            count = sum(plain.counts(row)["next_token"] for row in rows)
            by_hand = by_hand + weights[name] * nll / count
        for batches in ([batch], window):
            loss = sum(
                term.weight * term.sum / one.totals[name]
                for one in batches
                for name, term in objective(vlm, one).items()
            )
            torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sets": {}}, r"no data set.*data.train.sets"),
        ({"sets": {"a": [1], "b": []}}, "'b'.*empty"),
        ({"shares": "roots"}, "'roots'.*size, root, equal.*a, b"),
        ({"shares": {"a": 1, "c": 2}}, "names 'c'.*a, b"),
        ({"shares": {"a": 1}}, "no number for 'b'.*a, b"),
        ({"shares": {"a": 1, "b": 0}}, r"shares\.b is 0.*above 0"),
        ({"shares": {"a": 1, "b": float("nan")}}, r"shares\.b is nan"),
        ({"size": 1}, "size 1 is less"),
    ],
)
def test_bad_mixtures_get_one_sentence(options, match):
    with pytest.raises(DataError, match=match) as told:
        Mixture(**({"sets": {"a": [1], "b": [2]}} | options))
    assert "\n" not in str(told.value)


def test_data_mixture_composes_with_sets_shares_and_weights_of_ones_own(tmp_path, tiny):
    rows = [{"text": "User: what color?\nAssistant: red"}, {"text": "User: a?\nAssistant: no"}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    own = f"{{_target_: triptych.data.readers.Instructions, path: {tmp_path}/own.json}}"
    options = [
        "data=mixture",
        f"data.train.sets.mine={own}",
        "~data.train.sets.shapes",
        "data.train.sets.easy_vqa.limit=40",
        "data.train.shares={mine: 1, easy_vqa: 3}",
        "data.train.size=8",
        "objective.weights={mine: 0.5, easy_vqa: 1.0}",
    ]
    cfg = compose_preset("llava", options)
    mixture = build(cfg.data.train)
    assert mixture.counts == {"easy_vqa": 6, "mine": 2}
    assert Counter(s.source for s in mixture) == mixture.counts
    cfg.model.vision.weights, cfg.model.language.weights = (
        str(tiny / part) for part in ("vision", "language")
    )
    objective = build_objective(cfg, 1)
    data = build_data(cfg, build_model(cfg).model.processor(), objective)
    (batch,) = data.train_dataloader()
    assert batch.totals == objective.counts(batch) and min(batch.totals.values()) > 0


def test_the_default_mixture_needs_no_file():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        checked, _ = check_overrides("train", ["data=mixture", "data.train.shares=root"])
        mixture = build(hydra.compose("train", checked).data.train)
    assert set(mixture.sets) == {"easy_vqa", "shapes"} and len(mixture) == 38_575 + 32_000
    plan = RowPlan(mixture, 16, None, 0)
    assert sum(map(len, plan.rows(0))) == len(mixture)

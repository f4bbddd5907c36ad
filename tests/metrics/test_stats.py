"""Intervals and paired comparisons: known values, coverage of clusters, speed."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from triptych.evaluation.metrics import (
    clustered_bootstrap,
    holm,
    mcnemar,
    paired_compare,
    wilson,
)
from triptych.types import TriptychError


def test_bootstrap_value_is_the_mean_and_the_interval_holds_it():
    values = [1, 0, 1, 1, 0, 1, 0, 1, 1, 1]
    value, low, high = clustered_bootstrap(values)
    assert value == 0.7 and 0.3 <= low < 0.7 < high <= 1.0
    assert clustered_bootstrap(values) == (value, low, high)


def test_bootstrap_standard_error_matches_theory():
    values = np.random.default_rng(0).random(400)
    _, low, high = clustered_bootstrap(values, resamples=4000)
    assert (high - low) / (2 * 1.96) == pytest.approx(values.std() / 20, rel=0.05)


def test_clusters_widen_the_interval():
    answers = np.random.default_rng(1).integers(0, 2, 50).repeat(10)  # ten equal questions an image
    images = np.arange(50).repeat(10)
    alone, together = clustered_bootstrap(answers), clustered_bootstrap(answers, images)
    assert alone.value == together.value
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


def test_bootstrap_of_a_ratio_of_sums_and_uneven_clusters():
    edits = np.array([[1, 10], [0, 5], [4, 4], [2, 20]])
    rate = clustered_bootstrap(edits, ["a", "a", "b", "c"], lambda s: s[..., 0] / s[..., 1])
    assert rate.value == 7 / 39
    assert rate.low >= 1 / 15 - 1e-12 and rate.high <= 1.0
    with pytest.raises(TriptychError, match="statistic"):
        clustered_bootstrap(edits)


def test_one_cluster_has_no_interval():
    value, low, high = clustered_bootstrap([1, 0], ["same", "same"])
    assert value == 0.5 and math.isnan(low) and math.isnan(high)


def test_bootstrap_refuses_bad_input():
    with pytest.raises(TriptychError, match="finite"):
        clustered_bootstrap([])
    with pytest.raises(TriptychError, match="finite"):
        clustered_bootstrap([1.0, math.nan])
    with pytest.raises(TriptychError, match="2 values but 1 clusters"):
        clustered_bootstrap([1, 2], ["a"])


def test_ten_thousand_rows_are_fast():
    rng = np.random.default_rng(0)
    values, clusters = rng.random(10_000), rng.integers(0, 5000, 10_000)
    start = time.process_time()
    clustered_bootstrap(values, clusters)
    paired_compare(values, rng.random(10_000), clusters)
    assert time.process_time() - start < 6.0


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (1, 1, 0.20655, 1)],
)
def test_wilson_known_values(successes, n, low, high):
    value, *bounds = wilson(successes, n)
    assert value == successes / n
    assert bounds == pytest.approx([low, high], abs=1e-5)


def test_wilson_refuses_the_impossible():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(TriptychError, match="impossible"):
            wilson(successes, n)


def test_compare_equal_runs():
    scores = [1, 0, 1, 1]
    assert paired_compare(scores, scores) == (0.0, 0.0, 0.0, 1.0, 4, 4)


def test_compare_enumerates_few_clusters():
    # three clusters, all won: of eight sign patterns two are as extreme
    result = paired_compare([1, 1, 1, 1], [0, 0, 0, 0], ["x", "x", "y", "z"])
    assert result.difference == 1.0 and result.p == 0.25 and result.clusters == 3


def test_compare_samples_many_clusters():
    wins = [1] * 15 + [0] * 5  # a sign test: 15 of 20 has an exact two-sided p of 0.0414
    result = paired_compare(wins, [1 - w for w in wins])
    assert result.difference == 0.5 and result.p == pytest.approx(0.0414, abs=0.008)
    assert paired_compare([1] * 40, [0] * 40, resamples=99).p == 0.01  # never 0


def test_compare_finds_a_real_difference_and_its_sign():
    rng = np.random.default_rng(0)
    images = np.arange(300).repeat(3)
    good, bad = rng.random(900) < 0.8, rng.random(900) < 0.5
    result = paired_compare(good, bad, images)
    assert result.difference > 0.2 and result.low > 0 and result.p < 0.001
    back = paired_compare(bad, good, images)
    assert back.difference == -result.difference and back.p == result.p


def test_compare_calls_noise_no_difference():
    rng = np.random.default_rng(3)
    ps = [
        paired_compare(rng.random(60) < 0.6, rng.random(60) < 0.6, resamples=500).p
        for _ in range(200)
    ]
    assert sum(p < 0.05 for p in ps) <= 20  # 10 expected, 20 is beyond three standard deviations


def test_compare_ignores_questions_of_one_image_as_evidence():
    # one image with 100 questions won is one win, not 100
    a, b = [1] * 100 + [0, 1, 0, 1], [0] * 100 + [1, 0, 1, 0]
    assert paired_compare(a, b, ["big"] * 100 + list("wxyz")).p > 0.5
    assert paired_compare(a, b).p < 0.001


def test_compare_needs_pairs():
    with pytest.raises(TriptychError, match="pair up"):
        paired_compare([1, 2], [1])


def test_mcnemar_by_hand():
    a, b = [1] * 6 + [0] + [1, 0], [0] * 6 + [1] + [1, 0]
    assert mcnemar(a, b) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert mcnemar([1, 0], [0, 1]).p == 1.0
    assert mcnemar([1, 1], [1, 1]) == (0, 0, 1.0)
    with pytest.raises(TriptychError, match="right or wrong"):
        mcnemar([0.5], [1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []

"""Uncertainty: intervals clustered by image, and paired comparisons of two runs.

Questions about one image are not independent, so images are drawn, not questions. All draws come
from a seed: the same rows give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from triptych.evaluation.metrics._shared import as_array, mistake

_CELLS = 1 << 20  # random numbers held at once
_EXACT = 14  # clusters up to which all sign flips are enumerated
Statistic = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The difference a - b of two runs on the same samples, its interval and p-value."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    clusters: int


class McNemar(NamedTuple):
    """Samples only the first run has right, only the second has, and the exact two-sided p."""

    wins: int
    losses: int
    p: float


def _rows(values: Any, clusters: Sequence[Hashable] | None, metric: str) -> tuple[Any, Any]:
    """Values as (n,m) floats, and the cluster of each row as an index from 0 (C clusters)."""
    rows = as_array(values).astype(np.float64)
    if rows.ndim not in (1, 2) or not len(rows) or not np.isfinite(rows).all():
        raise mistake(f"{metric} needs one or more finite values, (n,) or (n,m).")
    if clusters is None:
        return rows, np.arange(len(rows))
    names = [str(name) for name in clusters]
    if len(names) != len(rows):
        raise mistake(f"{metric}: {len(rows)} values but {len(names)} clusters; give one a value.")
    return rows, np.unique(names, return_inverse=True)[1]


def _cluster_sums(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    columns = rows if rows.ndim == 2 else rows[:, None]
    return np.stack([np.bincount(index, weights=c) for c in columns.T], axis=1)  # (C,m)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def clustered_bootstrap(
    values: Any,
    clusters: Sequence[Hashable] | None = None,
    statistic: Statistic | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over clusters (images): (value, low, high).

    `values` (n,) gives their mean. For a corpus metric that is a function of sums, pass (n,m) rows
    and `statistic`, which maps sums (..., m) to (...): error rates are edits and symbols with
    `lambda s: s[..., 0] / s[..., 1]`, F1 has three columns. Without `clusters` every row is one.
    One cluster says nothing about spread: its bounds are NaN.
    """
    rows, index = _rows(values, clusters, "clustered_bootstrap")
    if (rows.ndim == 2) != (statistic is not None):
        raise mistake("clustered_bootstrap: (n,m) values need a statistic, (n,) takes none.")
    if rows.ndim == 1:
        rows, statistic = np.stack([rows, np.ones(len(rows))], axis=1), _mean
    sums = _cluster_sums(rows, index)
    value, size = float(statistic(sums.sum(0))), len(sums)
    if size == 1:
        return Interval(value, math.nan, math.nan)
    rng, draws, step = np.random.default_rng(seed), [], max(1, _CELLS // size)
    for start in range(0, resamples, step):
        chosen = rng.integers(0, size, size=(min(step, resamples - start), size))
        drawn = np.stack([column[chosen].sum(1) for column in sums.T], axis=-1)
        draws.append(statistic(drawn))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a plain accuracy, sound at 0, 1 and small n: (value, low, high)."""
    if n < 1 or not 0 <= successes <= n:
        raise mistake(f"wilson: {successes} successes of {n} is impossible; n must be 1 or more.")
    z, p = NormalDist().inv_cdf(0.5 + confidence / 2), successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    return Interval(p, low, 1.0 if successes == n else min(1.0, middle + half))


def paired_compare(
    a: Any,
    b: Any,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two runs on the same samples: mean of a - b, clustered interval, sign-flip p.

    `a` and `b` are scores a sample in the same order. Under "no difference" the sign of each
    cluster's summed difference is arbitrary; p is two-sided, over all sign patterns up to 14
    clusters, over `resamples` random ones above.
    """
    left, right = as_array(a).astype(np.float64), as_array(b).astype(np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise mistake(f"paired_compare: scores {left.shape} and {right.shape} must pair up, (n,).")
    rows, index = _rows(left - right, clusters, "paired_compare")
    value, low, high = clustered_bootstrap(rows, clusters, confidence=confidence, seed=seed)
    sums = _cluster_sums(rows, index)[:, 0]
    p = _sign_flip(sums[sums != 0], resamples, seed)
    return Comparison(value, low, high, p, len(rows), len(sums))


def _sign_flip(sums: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p of sum(sums) when every sign may flip."""
    size = len(sums)
    if not size:
        return 1.0
    reach = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal up to rounding counts as reached
    if size <= _EXACT:
        signs = (np.arange(1 << size)[:, None] >> np.arange(size) & 1) * 2 - 1
        return float((np.abs(signs @ sums) >= reach).mean())
    rng, total, reached = np.random.default_rng(seed), sums.sum(), 0
    step = max(1, 8 * _CELLS // size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        bits = np.unpackbits(np.frombuffer(rng.bytes(rows * -(-size // 8)), np.uint8))
        kept = bits.reshape(rows, -1)[:, :size].astype(np.float64) @ sums
        reached += int((np.abs(2 * kept - total) >= reach).sum())
    return (reached + 1) / (resamples + 1)


def mcnemar(a: Any, b: Any) -> McNemar:
    """Exact McNemar test of two runs' right/wrong answers on the same samples.

    Takes booleans (or 0 and 1). Only samples on which they disagree count; questions are taken as
    independent, so prefer `paired_compare` where an image has several.
    """
    left, right = as_array(a), as_array(b)
    if left.shape != right.shape or left.ndim != 1 or not left.size:
        raise mistake(f"mcnemar: {left.shape} and {right.shape} must pair up, (n,) each.")
    if not (np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all()):
        raise mistake("mcnemar: answers must be right or wrong (1 or 0); use paired_compare.")
    left, right = left.astype(bool), right.astype(bool)
    wins, losses = int((left & ~right).sum()), int((right & ~left).sum())
    n, term, below = wins + losses, 1, 1
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)  # exact: the binomial coefficient n over k + 1
        below += term
    return McNemar(wins, losses, min(1.0, (2 * below) / (1 << n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values, in the order given (for many runs at once)."""
    order, adjusted, most = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - place) * float(p_values[i])))
        adjusted[i] = most
    return adjusted

"""Intervals of values that are no proportions: CIDEr-D, error rates, F1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from triptych.evaluation.benchmark import Record
from triptych.evaluation.metrics.stats import clustered_bootstrap


def with_spread(
    rows: Sequence[Any],
    records: Sequence[Record],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """The value with its interval by image; no interval where all images are one or alike.

    rows: a number a record, whose mean is meant, or (with `statistic`) the columns it sums.
    """
    found = clustered_bootstrap(rows, [r["cluster_id"] for r in records], statistic)
    known = not math.isnan(found.low) and found.low < found.high
    low, high = (found.low, found.high) if known else (None, None)
    return {"value": found.value, "n": len(records), "low": low, "high": high}

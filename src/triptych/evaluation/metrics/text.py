"""Language-model metrics from stored sums: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from triptych.evaluation.metrics._shared import as_array, mistake

Totals = float | Sequence[float]


def _sums(nlls: Totals, units: Totals, metric: str, unit: str) -> tuple[float, float]:
    losses, counts = (np.atleast_1d(as_array(v)).astype(np.float64) for v in (nlls, units))
    if losses.shape != counts.shape or not losses.size:
        raise mistake(f"{metric} needs one summed loss and one count of {unit} a sample.")
    if not np.isfinite(losses).all() or counts.sum() <= 0:
        raise mistake(f"{metric}: losses must be finite and the {unit} more than 0.")
    return math.fsum(losses), math.fsum(counts)


def perplexity(nlls: Totals, tokens: Totals) -> float:
    """exp(all negative log-likelihoods / all answer tokens), natural logarithm.

    Takes SUMS, one a sample: a mean of batch means weighs short batches too much. Prompt and image
    tokens belong in neither. Not comparable across tokenisers: see `bits_per_byte`.
    """
    loss, count = _sums(nlls, tokens, "perplexity", "tokens")
    return math.exp(loss / count) if loss / count < 709 else math.inf


def bits_per_byte(nlls: Totals, sizes: Totals) -> float:
    """Negative log-likelihood in bits per UTF-8 byte of the answers, comparable across tokenisers.

    `nlls` are natural-log sums, one a sample; `sizes` are the bytes of the same answers.
    """
    loss, count = _sums(nlls, sizes, "bits_per_byte", "bytes")
    return loss / math.log(2) / count

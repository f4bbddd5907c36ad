"""Zero-shot classification and the linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from triptych.evaluation.metrics._shared import as_array, mistake

PROBE_RECIPE = "logistic-regression-lbfgs-1000"
PROBE_CS = (0.001, 0.01, 0.1, 0.316, 1.0, 10.0, 100.0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise mistake("ensemble_prompts: an embedding is not finite or has length 0.")
    return vectors / norms


def ensemble_prompts(embeddings: Any) -> Any:
    """(C,E) class weights of unit length from prompt embeddings: normalise, mean, normalise.

    `embeddings` is (C,T,E), or a list of (T,E) where classes have different numbers of prompts.
    Both normalisations matter (Radford et al. 2021, section 3.1.4). Tensors give a tensor.
    """
    parts = list(embeddings)
    if not parts:
        raise mistake("ensemble_prompts: there are no classes; pass (classes, prompts, width).")
    arrays = [as_array(part) for part in parts]
    if any(a.ndim != 2 or not len(a) for a in arrays):
        raise mistake("ensemble_prompts: every class needs embeddings of shape (prompts, width).")
    weights = np.stack([_unit(_unit(array).mean(axis=0)) for array in arrays])
    first = parts[0]
    if not hasattr(first, "detach"):
        return weights
    import torch

    return torch.from_numpy(weights).to(device=first.device, dtype=first.dtype)


def topk_hits(scores: Any, labels: Any, k: int) -> np.ndarray:
    """(N,) the chance that the label is among the k best of (N,C) scores; ties by expectation."""
    matrix, gold = as_array(scores), as_array(labels)
    if matrix.ndim != 2 or gold.shape != matrix.shape[:1] or not gold.size:
        raise mistake(f"scores {matrix.shape} must be (N,C) with one label a row {gold.shape}.")
    if gold.min() < 0 or gold.max() >= matrix.shape[1] or np.isnan(matrix).any():
        raise mistake("labels must lie in 0 .. C-1 and scores must not be NaN.")
    own = np.take_along_axis(matrix, gold[:, None].astype(np.int64), axis=1)
    above, tied = (matrix > own).sum(1), (matrix == own).sum(1)  # tied counts the label itself
    return np.clip((k - above) / tied, 0.0, 1.0)


def accuracy_topk(scores: Any, labels: Any, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Top-k accuracy of (N,C) scores in [0, 1]; a k above the number of classes is left out.

    Equal scores count by expectation, so constant scores give k / C.
    """
    classes = as_array(scores).shape[-1]
    return {k: float(topk_hits(scores, labels, k).mean()) for k in ks if k <= classes}


def mean_class_recall(predictions: Any, labels: Any) -> float:
    """Accuracy averaged over the classes that occur among the labels (balanced accuracy).

    `predictions` are (N,) classes or (N,C) scores.
    """
    predicted, gold = as_array(predictions), as_array(labels)
    if predicted.ndim == 2:
        hits = topk_hits(predicted, gold, 1)
    elif predicted.shape == gold.shape and gold.size:
        hits = (predicted == gold).astype(np.float64)
    else:
        raise mistake(f"mean_class_recall: {predicted.shape} predictions, {gold.shape} labels.")
    _, inverse, counts = np.unique(gold, return_inverse=True, return_counts=True)
    return float((np.bincount(inverse, weights=hits) / counts).mean())


def linear_probe(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    c: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Logistic regression on frozen features, as CLIP is probed (Radford et al. 2021).

    Without `c`, the regularisation is chosen from `PROBE_CS` on a fifth of every class of TRAIN
    (the smaller c on a tie), then all of train is fitted. Features are (N,D), used as they are.
    Returns `accuracy`, `mean_class_recall`, `c`, `predictions` (N,) and `recipe`.
    """
    x, y = as_array(train_features), as_array(train_labels)
    test_x, test_y = as_array(test_features), as_array(test_labels)
    if x.ndim != 2 or len(x) != len(y) or len(test_x) != len(test_y) or not len(test_y):
        raise mistake("linear_probe: features must be (N,D) with one label a row, test non-empty.")
    if len(np.unique(y)) < 2:
        raise mistake("linear_probe: the training labels must hold two classes or more.")
    if c is None:
        c = _choose_c(x, y, seed)
    predictions = _fit(x, y, c).predict(test_x)
    return {
        "accuracy": float((predictions == test_y).mean()),
        "mean_class_recall": mean_class_recall(predictions, test_y),
        "c": c,
        "predictions": predictions,
        "recipe": PROBE_RECIPE,
    }


def _fit(x: np.ndarray, y: np.ndarray, c: float) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise mistake("linear_probe needs scikit-learn; pip install scikit-learn.") from None
    return LogisticRegression(C=c, max_iter=1000, random_state=0).fit(x, y)


def _choose_c(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """The c that does best on a fifth of every class, drawn by `seed`."""
    rng, held = np.random.default_rng(seed), np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        if len(rows) < 2:
            raise mistake(
                f"linear_probe: class {label!r} has one training sample, so c cannot be chosen on "
                "train; pass c=0.316."
            )
        held[rng.permutation(rows)[: max(1, len(rows) // 5)]] = True
    scores = [(_fit(x[~held], y[~held], c).predict(x[held]) == y[held]).mean() for c in PROBE_CS]
    return PROBE_CS[int(np.argmax(scores))]

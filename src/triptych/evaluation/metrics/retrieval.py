"""Retrieval: recall at k with fair ties, re-ranking by a matching head, and paired selection.

Ties count by their expectation over random orders, computed exactly. So the order of the gallery
never matters, and an encoder that maps everything to one point scores chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from triptych.evaluation.metrics._shared import as_array, mistake

RETRIEVAL_RULE = "any-relevant, expected-ties"
_ROWS = 512  # queries handled at once: (512, 25,000) booleans are 13 MB


def _matrix(similarity: Any, metric: str) -> np.ndarray:
    matrix = as_array(similarity)
    if matrix.ndim != 2 or not matrix.size:
        raise mistake(f"{metric}: similarity must be (queries, gallery), not {matrix.shape}.")
    if np.isnan(matrix).any():
        raise mistake(f"{metric}: similarity holds NaN; look for embeddings of zero length.")
    return matrix


def _counts(similarity: Any, relevant: Sequence[Any], metric: str) -> np.ndarray:
    """(N,4): gallery items strictly above the best relevant one, others tied with it, relevant
    ones tied at the top, and 1 if the best relevant one was excluded (-inf).
    """
    matrix = _matrix(similarity, metric)
    n, size = matrix.shape
    truth = [np.unique(np.atleast_1d(as_array(items)).astype(np.int64)) for items in relevant]
    if len(truth) != n or any(not t.size or t[0] < 0 or t[-1] >= size for t in truth):
        raise mistake(
            f"{metric}: give each of the {n} queries one or more relevant gallery indices "
            f"from 0 to {size - 1}."
        )
    best = np.array([matrix[i, t].max() for i, t in enumerate(truth)])
    tied_true = np.array([(matrix[i, t] == best[i]).sum() for i, t in enumerate(truth)])
    above, tied = np.empty(n, np.int64), np.empty(n, np.int64)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        above[rows] = (matrix[rows] > best[rows, None]).sum(1)
        tied[rows] = (matrix[rows] == best[rows, None]).sum(1)
    return np.stack([above, tied - tied_true, tied_true, np.isneginf(best)], axis=1)


def retrieval_hits(
    similarity: Any, relevant: Sequence[Any], ks: Sequence[int] = (1, 5, 10)
) -> np.ndarray:
    """(N, len(ks)): the chance that each query finds ANY relevant item among its first k.

    0 or 1 without ties; the rows to bootstrap. `similarity` is (N, M), `relevant` holds for each
    query its gallery indices. Items at -inf count as never returned.
    """
    above, tied, true, excluded = _counts(similarity, relevant, "recall_at_k").T
    hits = np.empty((len(above), len(ks)))
    for column, k in enumerate(ks):
        if k < 1:
            raise mistake(f"recall_at_k: k must be 1 or more, not {k}.")
        places = np.clip(k - above, 0, tied + true)  # places of the first k left to the tied
        miss = np.ones(len(above))
        for j in range(int(places.max(initial=0))):
            drawn = j < places
            left = np.where(drawn, tied + true - j, 1)
            miss = np.where(drawn, miss * np.maximum(tied - j, 0) / left, miss)
        hits[:, column] = np.where(excluded == 1, 0.0, 1.0 - miss)
    return hits


def recall_at_k(
    similarity: Any, relevant: Sequence[Any], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """R@k as papers report it, in [0, 1]: the share of queries with ANY relevant item in the top k.

    For image to text a query has several relevant captions and one is enough; this is not the
    share of captions found. `similarity` is (queries, gallery), higher is nearer; `relevant` holds
    a list of gallery indices (or one index) a query. k may pass the size of the gallery.
    """
    return dict(zip(ks, retrieval_hits(similarity, relevant, ks).mean(0).tolist(), strict=True))


def retrieval_ranks(similarity: Any, relevant: Sequence[Any]) -> np.ndarray:
    """(N,) expected rank of the best relevant item of each query, 1 = first (for median rank)."""
    above, tied, true, _ = _counts(similarity, relevant, "retrieval_ranks").T
    return above + (tied + true + 1) / (true + 1)


def map_at_r(similarity: Any, relevant: Sequence[Any]) -> float:
    """mAP@R (Musgrave et al. 2020): precision averaged over the first R places of each query, R its
    number of relevant items. Among equal scores the irrelevant items come first.
    """
    matrix, values = _matrix(similarity, "map_at_r"), []
    for scores, items in zip(matrix, relevant, strict=True):
        truth = np.zeros(len(scores), bool)
        truth[np.atleast_1d(as_array(items)).astype(np.int64)] = True
        r = int(truth.sum())
        first = truth[np.lexsort((truth, -scores))[:r]]
        values.append((first * np.cumsum(first) / np.arange(1, r + 1)).sum() / r)
    return float(np.mean(values))


def retrieval_report(similarity: Any, image_of_text: Sequence[int]) -> dict[str, float]:
    """Both directions of an image-text test from one (images, texts) matrix.

    `i2t_r1` ... `t2i_r10` in [0, 1], `mean_recall` over the six, and the median rank of each side.
    `image_of_text[j]` is the image of text j; images may own different numbers of texts.
    """
    matrix = _matrix(similarity, "retrieval_report")
    owner = np.asarray(image_of_text, dtype=np.int64)
    if owner.shape != matrix.shape[1:]:
        raise mistake("retrieval_report: image_of_text must name one image for every text.")
    texts = [np.flatnonzero(owner == image) for image in range(len(matrix))]
    report = {}
    for side, scores, relevant in (("i2t", matrix, texts), ("t2i", matrix.T, owner)):
        for k, value in recall_at_k(scores, relevant).items():
            report[f"{side}_r{k}"] = value
    report["mean_recall"] = sum(report.values()) / len(report)
    report["i2t_median_rank"] = float(np.median(retrieval_ranks(matrix, texts)))
    report["t2i_median_rank"] = float(np.median(retrieval_ranks(matrix.T, owner)))
    return report


def shortlist(similarity: Any, k_test: int) -> np.ndarray:
    """(N,k) gallery indices of the k_test nearest items of each query, nearest first.

    Equal scores keep the order of the gallery. These are the pairs a matching head must see.
    """
    matrix = _matrix(similarity, "shortlist")
    if k_test < 1:
        raise mistake(f"k_test must be 1 or more, not {k_test}.")
    return np.argsort(-matrix, axis=1, kind="stable")[:, :k_test]


def rerank_with_match(similarity: Any, match_logits: Any, k_test: int) -> np.ndarray:
    """(N,M) scores of one direction: match LOGIT + similarity on the shortlist, -inf elsewhere.

    As BLIP and BLIP-2 evaluate (Li et al. 2022, 2023). `similarity` is (N,M), of a Q-Former
    already the maximum over its queries. `match_logits` is (N,M), of which only the entries of
    `shortlist(similarity, k_test)` are read, or (N,k_test) in the order of that list if k_test < M.
    The share of queries whose shortlist holds a relevant item is the ceiling of R@k.
    """
    matrix = _matrix(similarity, "rerank_with_match")
    chosen, logits = shortlist(matrix, k_test), as_array(match_logits)
    if logits.shape == matrix.shape:
        logits = np.take_along_axis(logits, chosen, axis=1)
    if logits.shape != chosen.shape or not np.isfinite(logits).all():
        raise mistake(
            f"rerank_with_match: match_logits must be finite on the shortlist, {matrix.shape} or "
            f"{chosen.shape}, not {logits.shape}."
        )
    out = np.full(matrix.shape, -np.inf)
    np.put_along_axis(out, chosen, logits + np.take_along_axis(matrix, chosen, axis=1), axis=1)
    return out


def paired_selection(scores: Any) -> dict[str, float]:
    """Strict wins on paired sets: a tie is lost, so that a collapsed encoder scores 0.

    (N,2,2) `scores[i][image][text]` gives Winoground's `text`, `image` and `group` (Thrush et al.
    2022); (N,K) with the true caption FIRST gives `accuracy` (SugarCrepe, ARO).
    """
    s = as_array(scores)
    if not s.size or np.isnan(s).any():
        raise mistake("paired_selection: scores must hold at least one item and no NaN.")
    if s.ndim == 3 and s.shape[1:] == (2, 2):
        text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
        image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
        parts = {"text": text, "image": image, "group": text & image}
    elif s.ndim == 2 and s.shape[1] > 1:
        parts = {"accuracy": (s[:, :1] > s[:, 1:]).all(1)}
    else:
        raise mistake(f"paired_selection: scores must be (N,2,2) or (N,K>1), not {s.shape}.")
    return {name: float(wins.mean()) for name, wins in parts.items()} | {"n": len(s)}

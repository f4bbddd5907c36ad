"""Retrieval, re-ranking, paired sets and classification on hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.evaluation.metrics import (
    accuracy_topk,
    ensemble_prompts,
    map_at_r,
    mean_class_recall,
    paired_selection,
    recall_at_k,
    rerank_with_match,
    retrieval_hits,
    retrieval_ranks,
    retrieval_report,
    shortlist,
)
from triptych.types import TriptychError


def test_recall_counts_any_relevant_caption():
    similarity = [[0.9, 0.1, 0.8, 0.2], [0.7, 0.6, 0.1, 0.5]]
    relevant = [[1, 2], [3]]  # uneven numbers of captions
    assert recall_at_k(similarity, relevant, ks=(1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}
    assert retrieval_ranks(similarity, relevant).tolist() == [2.0, 3.0]
    assert recall_at_k(similarity, [2, 0], ks=(1, 100)) == {1: 0.5, 100: 1.0}


def test_recall_of_a_constant_encoder_is_chance():
    constant = np.zeros((20, 20), np.float32)
    assert recall_at_k(constant, range(20)) == pytest.approx({1: 0.05, 5: 0.25, 10: 0.5})
    captions = [[5 * i + j for j in range(5)] for i in range(4)]
    chance = 1 - (15 * 14) / (20 * 19)  # two draws of 20 without one of the five
    assert recall_at_k(np.ones((4, 20)), captions, ks=(2,))[2] == pytest.approx(chance)
    assert retrieval_ranks(constant, range(20)).tolist() == [10.5] * 20


def test_ties_below_the_top_share_the_places_left():
    hits = retrieval_hits([[5.0, 3.0, 3.0, 3.0, 1.0]], [[2]], ks=(1, 2, 3, 4))
    assert hits[0] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_recall_does_not_depend_on_the_order_of_the_gallery():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, (30, 50)).astype(np.float32)  # many ties
    relevant = [sorted(rng.choice(50, rng.integers(1, 6), replace=False)) for _ in range(30)]
    order = rng.permutation(50)
    place = np.argsort(order)
    moved = [[int(place[i]) for i in items] for items in relevant]
    assert recall_at_k(similarity[:, order], moved) == recall_at_k(similarity, relevant)


def test_recall_refuses_what_it_cannot_score():
    with pytest.raises(TriptychError, match="NaN"):
        recall_at_k([[np.nan, 1.0]], [[0]])
    with pytest.raises(TriptychError, match="one or more relevant"):
        recall_at_k([[1.0, 2.0]], [[]])
    with pytest.raises(TriptychError, match="0 to 1"):
        recall_at_k([[1.0, 2.0]], [[2]])
    with pytest.raises(TriptychError, match="1 or more"):
        recall_at_k([[1.0, 2.0]], [[1]], ks=(0,))


def test_recall_takes_tensors_of_any_precision():
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert recall_at_k(similarity.to(dtype), torch.arange(2), ks=(1,)) == {1: 1.0}


def test_single_image_set():
    report = retrieval_report([[0.3, 0.2]], [0, 0])
    assert report["mean_recall"] == 1.0 and report["i2t_median_rank"] == 1.0


def test_report_of_both_directions():
    similarity = [[0.9, 0.1, 0.3], [0.8, 0.2, 0.1]]  # (images, texts)
    report = retrieval_report(similarity, [0, 1, 1])
    assert report["i2t_r1"] == 0.5 and report["t2i_r1"] == pytest.approx(2 / 3)
    assert report["t2i_r5"] == 1.0 and report["i2t_median_rank"] == 1.5
    with pytest.raises(TriptychError, match="image_of_text"):
        retrieval_report(similarity, [0, 1])


def test_map_at_r_by_hand():
    assert map_at_r([[4, 3, 2, 1]], [[0, 2]]) == pytest.approx((1 + 0) / 2)
    assert map_at_r([[4, 3, 2, 1]], [[1, 0]]) == 1.0
    assert map_at_r([[1, 1, 1]], [[0]]) == 0.0  # among equals the irrelevant come first


def test_rerank_adds_logit_and_similarity_on_the_shortlist():
    similarity = np.array([[0.9, 0.8, 0.1], [0.1, 0.7, 0.6]])
    logits = np.array([[-1.0, 2.0, 9.0], [9.0, 0.0, 3.0]])
    assert shortlist(similarity, 2).tolist() == [[0, 1], [1, 2]]
    scores = rerank_with_match(similarity, logits, 2)
    assert scores == pytest.approx(np.array([[-0.1, 2.8, -np.inf], [-np.inf, 0.7, 3.6]]))
    listed = np.array([[-1.0, 2.0], [0.0, 3.0]])  # in the order of the shortlist
    assert rerank_with_match(similarity, listed, 2) == pytest.approx(scores)
    # outside the shortlist nothing is found, however large k is
    assert recall_at_k(scores, [[2], [2]], ks=(3,)) == {3: 0.5}
    with pytest.raises(TriptychError, match="finite"):
        rerank_with_match(similarity, np.full((2, 3), np.nan), 2)


def test_paired_selection_demands_strict_wins():
    winoground = np.zeros((3, 2, 2))
    winoground[0] = [[0.9, 0.1], [0.2, 0.8]]  # all right
    winoground[1] = [[0.9, 0.8], [0.1, 0.2]]  # texts right; image 0 wins both texts
    result = paired_selection(winoground)  # the third is one constant
    assert result == {"text": 2 / 3, "image": 1 / 3, "group": 1 / 3, "n": 3}
    half_tied = [[[0.5, 0.5], [0.1, 0.9]]]
    assert paired_selection(half_tied) == {"text": 0.0, "image": 1.0, "group": 0.0, "n": 1}
    assert paired_selection([[1.0, 0.0], [1.0, 1.0]]) == {"accuracy": 0.5, "n": 2}
    with pytest.raises(TriptychError, match=r"\(N,2,2\)"):
        paired_selection([[1.0], [2.0]])


def test_prompt_ensemble_normalises_before_and_after_the_mean():
    embeddings = np.array([[[10.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 4.0]]])
    weights = ensemble_prompts(embeddings)
    assert weights == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))
    tensors = ensemble_prompts(torch.tensor(embeddings, dtype=torch.float32))
    assert tensors.dtype == torch.float32 and torch.allclose(
        tensors, torch.tensor(weights, dtype=torch.float32)
    )
    uneven = ensemble_prompts([embeddings[0], embeddings[1][:1]])
    assert uneven == pytest.approx(weights)
    with pytest.raises(TriptychError, match="length 0"):
        ensemble_prompts(np.zeros((1, 1, 2)))


def test_topk_accuracy_with_ties_and_few_classes():
    scores = [[3.0, 2.0, 1.0], [0.0, 5.0, 5.0]]
    assert accuracy_topk(scores, [1, 2], ks=(1, 2, 5)) == {1: 0.25, 2: 1.0}
    assert accuracy_topk(np.zeros((4, 8)), [0, 1, 2, 7]) == {1: 1 / 8, 5: 5 / 8}
    with pytest.raises(TriptychError, match="0 .. C-1"):
        accuracy_topk(scores, [1, 3])


def test_mean_class_recall_weighs_classes_equally():
    assert mean_class_recall([0, 0, 0, 0, 1], [0, 0, 0, 1, 1]) == pytest.approx((1 + 0.5) / 2)
    assert mean_class_recall(np.zeros((5, 4)), [0, 0, 0, 1, 1]) == pytest.approx(0.25)
    with pytest.raises(TriptychError, match="predictions"):
        mean_class_recall([0, 1], [0])

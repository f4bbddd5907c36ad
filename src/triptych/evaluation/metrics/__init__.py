"""Metrics with their official rules, as pure functions over stored records.

None needs a model. Importing this package loads NumPy alone; rapidfuzz, NLTK, scikit-learn, torch
and Java are reached for only by the functions that need them. `RULES` names the rule, parser or
tokeniser behind every metric, to be stored beside its value.
"""

from triptych.evaluation.metrics.captions import bleu, cider_d, meteor, meteor_available, rouge_l
from triptych.evaluation.metrics.chair import chair, coco_synonyms, mentioned_objects, read_synonyms
from triptych.evaluation.metrics.choice import circular_accuracy, letter_report, parse_choice
from triptych.evaluation.metrics.classification import (
    accuracy_topk,
    ensemble_prompts,
    linear_probe,
    mean_class_recall,
    topk_hits,
)
from triptych.evaluation.metrics.documents import anls, cer, edit_counts, relaxed_accuracy, wer
from triptych.evaluation.metrics.pope import auroc, parse_pope, pope_scores
from triptych.evaluation.metrics.ptb import ptb_tokenize, tokenizer_name
from triptych.evaluation.metrics.ranking import CandidateScore, Ranking, rank_candidates
from triptych.evaluation.metrics.retrieval import (
    map_at_r,
    paired_selection,
    recall_at_k,
    rerank_with_match,
    retrieval_hits,
    retrieval_ranks,
    retrieval_report,
    shortlist,
)
from triptych.evaluation.metrics.rules import RULES
from triptych.evaluation.metrics.stats import (
    Comparison,
    Interval,
    McNemar,
    clustered_bootstrap,
    holm,
    mcnemar,
    paired_compare,
    wilson,
)
from triptych.evaluation.metrics.text import bits_per_byte, perplexity
from triptych.evaluation.metrics.vqa import (
    gqa_exact,
    normalize_evalai,
    normalize_vqa,
    vqa_accuracy,
)

__all__ = [
    "RULES",
    "CandidateScore",
    "Comparison",
    "Interval",
    "McNemar",
    "Ranking",
    "accuracy_topk",
    "anls",
    "auroc",
    "bits_per_byte",
    "bleu",
    "cer",
    "chair",
    "cider_d",
    "circular_accuracy",
    "clustered_bootstrap",
    "coco_synonyms",
    "edit_counts",
    "ensemble_prompts",
    "gqa_exact",
    "holm",
    "letter_report",
    "linear_probe",
    "map_at_r",
    "mcnemar",
    "mean_class_recall",
    "mentioned_objects",
    "meteor",
    "meteor_available",
    "normalize_evalai",
    "normalize_vqa",
    "paired_compare",
    "paired_selection",
    "parse_choice",
    "parse_pope",
    "perplexity",
    "pope_scores",
    "ptb_tokenize",
    "rank_candidates",
    "read_synonyms",
    "recall_at_k",
    "relaxed_accuracy",
    "rerank_with_match",
    "retrieval_hits",
    "retrieval_ranks",
    "retrieval_report",
    "rouge_l",
    "shortlist",
    "tokenizer_name",
    "topk_hits",
    "vqa_accuracy",
    "wer",
    "wilson",
]

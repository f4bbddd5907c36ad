"""The names of the rules, as data: what to write into the field beside a stored value.

The first name of a metric is its default. A change of a rule changes its name, and so the hash of
the scoring.
"""

from __future__ import annotations

from triptych.evaluation.metrics.chair import SINGULARIZER, SYNONYMS
from triptych.evaluation.metrics.choice import CHOICE_RULES
from triptych.evaluation.metrics.classification import PROBE_RECIPE
from triptych.evaluation.metrics.documents import ANLS_RULE, RELAXED_RULE
from triptych.evaluation.metrics.pope import POPE_RULES
from triptych.evaluation.metrics.ptb import TOKENIZERS
from triptych.evaluation.metrics.ranking import RANKING_RULES
from triptych.evaluation.metrics.retrieval import RETRIEVAL_RULE
from triptych.evaluation.metrics.vqa import GQA_RULES, VQA_RULES

RULES: dict[str, tuple[str, ...]] = {
    "vqa_accuracy": VQA_RULES,
    "gqa_exact": GQA_RULES,
    "anls": (ANLS_RULE,),
    "relaxed_accuracy": (RELAXED_RULE,),
    "cer": ("corpus-nfc",),
    "wer": ("corpus-nfc-blank-separated",),
    "parse_choice": CHOICE_RULES,
    "circular_accuracy": ("all-rotations",),
    "parse_pope": POPE_RULES,
    "pope_scores": ("yes-positive, unparsed-wrong",),
    "ptb_tokenize": TOKENIZERS,  # `tokenizer_name()` says what "auto" was
    "bleu": ("corpus-closest",),
    "rouge_l": ("beta-1.2",),
    "cider_d": ("sigma-6, df-of-run",),
    "meteor": ("meteor-1.5-en-norm",),
    "chair": (f"{SYNONYMS}, {SINGULARIZER}",),
    "recall_at_k": (RETRIEVAL_RULE,),
    "rerank_with_match": ("logit+similarity",),
    "paired_selection": ("strict",),
    "accuracy_topk": ("expected-ties",),
    "linear_probe": (PROBE_RECIPE,),
    "rank_candidates": RANKING_RULES,
}

"""Captions against several references: CIDEr-D, BLEU, ROUGE-L, METEOR where Java is, CHAIR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from triptych.evaluation.baselines import Prior, question_of
from triptych.evaluation.benchmark import Metrics, Record
from triptych.evaluation.metrics import (
    RULES,
    bleu,
    chair,
    cider_d,
    meteor,
    meteor_available,
    ptb_tokenize,
    rouge_l,
    tokenizer_name,
)
from triptych.evaluation.scorers import Outcome, Scorer
from triptych.evaluation.spread import with_spread
from triptych.evaluation.wording import Ask
from triptych.types import Sample

SPICE = {"spice": "needs Java and CoreNLP models that no package ships"}
METEOR = {"meteor": "needs Java and pycocoevalcap"}


class CaptionBenchmark:
    """One caption an image, scored over all images at once; papers write these values times 100.

    samples: one an image, its captions in meta["references"] and, for CHAIR, its annotated objects
    in meta["objects"]. Weights of words in CIDEr-D are those of this run, so a limited run is
    another benchmark, and the blind run takes all images. `prior` says the training split's most
    frequent caption. What could not be computed is named in `left_out`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        train: Sequence[Sample] | None = None,
        max_new_tokens: int = 40,
        decoding: dict[str, Any] | None = None,
        tokenizer: str = "auto",
        scorers: Sequence[Scorer] | None = None,
    ) -> None:
        self.samples, self.train, self.tokenizer = samples, train, tokenizer
        self.scorers = list(scorers) if scorers else [Ask(max_new_tokens, dict(decoding or {}))]
        self.left_out = SPICE | ({} if meteor_available() else METEOR)

    @property
    def notes(self) -> list[str]:
        """What the evaluator says before it starts."""
        return [f"left out: {name}, which {why}" for name, why in self.left_out.items()]

    @cached_property
    def blind_ids(self) -> list[str]:
        """All samples: CIDEr-D of a subset is not comparable with that of the whole."""
        return [self.samples[i].id for i in range(len(self.samples))]

    @cached_property
    def prior(self) -> Prior | None:
        return Prior(self.train) if self.train is not None and len(self.train) else None

    def record(self, sample: Sample, outcome: Outcome) -> Record:
        """One row; `correct` is the caption's ROUGE-L, which needs no other image."""
        caption = outcome.raw.strip()
        references = list(sample.meta["references"])
        key = sample.id
        found = {key: caption}, {key: references}
        words, rivals = (ptb_tokenize(texts, "nltk") for texts in found)
        row = {
            "sample_id": sample.id,
            "cluster_id": sample.cluster or sample.id,
            "image": ", ".join(image.name for image in sample.images),
            "question": question_of(sample),
            "gold": references[0],
            "references": references,
            "raw_output": outcome.raw,
            "parsed": caption or None,
            "correct": rouge_l(words, rivals)[0],
            "slice": "",
        }
        objects = sample.meta.get("objects")
        return row if objects is None else row | {"objects": list(objects)}

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """CIDEr-D first, with its interval over images."""
        said = {r["sample_id"]: r["parsed"] or "" for r in records}
        gold = {r["sample_id"]: r["references"] for r in records}
        words, rivals = ptb_tokenize(said, self.tokenizer), ptb_tokenize(gold, self.tokenizer)
        made: Metrics = {}
        for name, metric in (("cider_d", cider_d), ("rouge_l", rouge_l)):
            _, values = metric(words, rivals)
            made[name] = with_spread([values[r["sample_id"]] for r in records], records)
        plain = {"n": len(records), "low": None, "high": None}
        for order, value in enumerate(bleu(words, rivals)[0], 1):
            made[f"bleu_{order}"] = {"value": value, **plain}
        if meteor_available():
            made["meteor"] = {"value": meteor(words, rivals)[0], **plain}
        shared = {
            "chance": None,
            "unparsed": sum(r["parsed"] is None for r in records) / len(records),
            "words": sum(len(text.split()) for text in words.values()) / len(records),
            "tokenizer": tokenizer_name(self.tokenizer),
        }
        for name, entry in made.items():
            rule = RULES.get("bleu" if name.startswith("bleu") else name, (name,))[0]
            entry |= shared | {"rule": rule}
        if all("objects" in record for record in records):
            made |= self._chair(records, said, gold)
        return made

    def _chair(self, records: Sequence[Record], said: dict, gold: dict) -> Metrics:
        values, _ = chair(said, {r["sample_id"]: r["objects"] for r in records}, gold)
        beside = {name: values[name] for name in ("words", "mentions")}
        entry = {"n": len(records), "low": None, "high": None, "rule": RULES["chair"][0], **beside}
        return {
            "chair_s": {"value": values["chair_s"], "better": "lower", **entry},
            "chair_i": {"value": values["chair_i"], "better": "lower", **entry},
            "object_recall": {"value": values["recall"], **entry},
        }

"""Scorers of models that embed: closed answers and classes are ranked by their cosine.

They take all samples at once (`whole`), so that every distinct image and text is embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from triptych.evaluation.baselines import question_of
from triptych.evaluation.metrics import (
    ensemble_prompts,
    linear_probe,
)
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Outcome
from triptych.types import ImageRef, Sample, TriptychError


@dataclass
class Similarity:
    """The candidate whose caption is nearest to the image (TAP-C's reading, arXiv 2203.07190).

    template: how question and answer become one caption, unless the sample brings a caption for
    each candidate in `meta["captions"]`. Ties go to no candidate.
    """

    template: str = "{question} {answer}"
    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best candidate of each sample, with all cosines in the candidates' order."""
        images, row = embed_images(predictor, [only_image(s, self.name) for s in samples])
        captions = [self.captions(sample) for sample in samples]
        texts, column = _embed_texts(predictor, [c for row in captions for c in row])
        outcomes = []
        for i, (sample, own) in enumerate(zip(samples, captions, strict=True)):
            vectors = texts[[column[caption] for caption in own]]  # (C,E)
            outcomes.append(best(sample.candidates, cosines(images[row[i]][None], vectors)[0]))
        return outcomes

    def captions(self, sample: Sample) -> list[str]:
        """One caption a candidate: the sample's own, or made of its question by the template."""
        candidates, question = _candidates(sample, self.name), question_of(sample)
        own = sample.meta.get("captions")
        if own is not None and len(own) != len(candidates):
            raise TriptychError(
                f"sample '{sample.id}' has {len(own)} captions for {len(candidates)} candidates; "
                "give one a candidate."
            )
        words = [self.template.format(question=question, answer=c).strip() for c in candidates]
        return list(own or words)


@dataclass
class ClassSimilarity:
    """The class whose ensemble of prompts is nearest (CLIP, arXiv 2103.00020, section 3.1.4)."""

    templates: Sequence[str] = ("a photo of a {}.",)
    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best class of each sample, with its cosine to every class."""
        images, row = embed_images(predictor, [only_image(s, self.name) for s in samples])
        weights: dict[tuple[str, ...], Tensor] = {}
        outcomes = []
        for i, sample in enumerate(samples):
            classes = tuple(_candidates(sample, self.name))
            if classes not in weights:
                prompts = [t.format(c) for c in classes for t in self.templates]
                vectors = predictor.embed_texts(prompts)
                weights[classes] = ensemble_prompts(
                    vectors.view(len(classes), len(self.templates), -1)
                )
            outcomes.append(best(classes, cosines(images[row[i]][None], weights[classes])[0]))
        return outcomes


@dataclass
class Probe:
    """Logistic regression on the image vectors of a training set, before any projection."""

    train: Sequence[Sample] = field(default_factory=list)
    c: float | None = 0.316
    name: str = "linear_probe"
    needs: str = "features"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The class the probe gives to each sample."""
        sets = []
        for part in (self.train, samples):
            rows = [part[i] for i in range(len(part))]
            features = predictor.features([only_image(s, self.name) for s in rows])
            sets += [features.numpy(), np.array([str(s.target) for s in rows])]
        fitted = linear_probe(*sets, c=self.c)
        facts = {"c": fitted["c"], "recipe": fitted["recipe"]}
        return [Outcome(str(p), str(p), extra=facts) for p in fitted["predictions"]]


def embed_images(predictor: Predictor, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
    """(U,K,E) embeddings of the distinct images, and for each reference its row."""
    distinct = {ref.key: ref for ref in refs}
    row = {key: i for i, key in enumerate(distinct)}
    return predictor.embed_images(list(distinct.values())), [row[ref.key] for ref in refs]


def cosines(images: Tensor, texts: Tensor) -> np.ndarray:
    """(U,T) in float32 from (U,K,E) and (T,E) unit vectors; the nearest of K counts."""
    scores = torch.stack([k.float() @ texts.float().T for k in images.unbind(1)]).amax(0)
    return scores.numpy()


def _embed_texts(predictor: Predictor, texts: Sequence[str]) -> tuple[Tensor, dict[str, int]]:
    distinct = list(dict.fromkeys(texts))
    return predictor.embed_texts(distinct), {text: i for i, text in enumerate(distinct)}


def best(candidates: Sequence[str], scores: np.ndarray) -> Outcome:
    """The candidate of the highest score; a tie at the top chooses none."""
    top = np.flatnonzero(scores == scores.max())
    choice = candidates[top[0]] if len(top) == 1 else ""
    return Outcome(choice, choice or None, scores.tolist())


def only_image(sample: Sample, scorer: str) -> ImageRef:
    """The one image of a sample; another number is a mistake."""
    if len(sample.images) != 1:
        raise TriptychError(
            f"sample '{sample.id}' has {len(sample.images)} images and the scorer {scorer} takes "
            "exactly one; leave it out, or ask a generative model."
        )
    return sample.images[0]


def _candidates(sample: Sample, scorer: str) -> list[str]:
    if len(sample.candidates) < 2:
        raise TriptychError(
            f"sample '{sample.id}' has no closed list of answers for the scorer {scorer}; give its "
            "candidates, or use the scorer generate."
        )
    return sample.candidates

"""Scorers of models that embed: closed answers, classes and captions are ranked by their cosine.

They take all samples at once (`whole`), so that every distinct image and text is embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np
import torch
from torch import Tensor

from triptych.evaluation.baselines import question_of
from triptych.evaluation.metrics import (
    ensemble_prompts,
    linear_probe,
    retrieval_hits,
    retrieval_ranks,
)
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Outcome
from triptych.types import ImageRef, Sample, TriptychError

KS = (1, 5, 10)


@dataclass
class Similarity:
    """The candidate whose caption is nearest to the image (TAP-C's reading, arXiv 2203.07190).

    template: how question and answer become one caption. Ties go to no candidate.
    """

    template: str = "{question} {answer}"
    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best candidate of each sample, with all cosines in the candidates' order."""
        images, row = embed_images(predictor, [_only_image(s, self.name) for s in samples])
        captions = [[self._caption(s, c) for c in _candidates(s, self.name)] for s in samples]
        texts, column = _embed_texts(predictor, [c for row in captions for c in row])
        outcomes = []
        for i, (sample, own) in enumerate(zip(samples, captions, strict=True)):
            vectors = texts[[column[caption] for caption in own]]  # (C,E)
            outcomes.append(_best(sample.candidates, cosines(images[row[i]][None], vectors)[0]))
        return outcomes

    def _caption(self, sample: Sample, answer: str) -> str:
        question = question_of(sample)
        return self.template.format(question=question, answer=answer).strip()


@dataclass
class ClassSimilarity:
    """The class whose ensemble of prompts is nearest (CLIP, arXiv 2103.00020, section 3.1.4)."""

    templates: Sequence[str] = ("a photo of a {}.",)
    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best class of each sample, with its cosine to every class."""
        images, row = embed_images(predictor, [_only_image(s, self.name) for s in samples])
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
            outcomes.append(_best(classes, cosines(images[row[i]][None], weights[classes])[0]))
        return outcomes


@dataclass
class Retrieve:
    """Ranks all captions for every image, and all images for every caption."""

    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """Hits, ranks, chance and ceiling of each caption; those of an image on its first one.

        The ceiling is what a perfect model reaches although captions of different images are equal.
        """
        images, owner = embed_images(predictor, [_only_image(s, self.name) for s in samples])
        captions = [sample.text for sample in samples]
        texts, column = _embed_texts(predictor, captions)
        scores = cosines(images, texts)[:, [column[c] for c in captions]]  # (U,T)
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        says = np.zeros((len(images), len(distinct)), bool)
        says[owner, [distinct[c] for c in captions]] = True
        perfect = says[:, [distinct[c] for c in captions]].astype(np.float32)
        own = [np.flatnonzero(np.equal(owner, u)) for u in range(len(images))]
        sides = {
            "i2t": _side(scores, own, perfect),
            "t2i": _side(scores.T, owner, perfect.T),
        }
        top = scores.argmax(0)
        refs = {owner[j]: sample.images[0].name for j, sample in enumerate(samples)}
        outcomes = []
        for j in range(len(samples)):
            facts = {f"t2i_{key}": value[j] for key, value in sides["t2i"].items()}
            first = own[owner[j]][0] == j
            for key, value in sides["i2t"].items():
                facts[f"i2t_{key}"] = value[owner[j]] if first else None
            outcomes.append(Outcome(refs[int(top[j])], extra=facts))
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
            features = predictor.features([_only_image(s, self.name) for s in rows])
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


def _best(candidates: Sequence[str], scores: np.ndarray) -> Outcome:
    best = np.flatnonzero(scores == scores.max())
    choice = candidates[best[0]] if len(best) == 1 else ""
    return Outcome(choice, choice or None, scores.tolist())


def _side(scores: np.ndarray, right: Sequence, perfect: np.ndarray) -> dict[str, list[float]]:
    """What each query of one direction finds, by chance and at best."""
    hits, best = retrieval_hits(scores, right, KS), retrieval_hits(perfect, right, KS)
    size = scores.shape[1]
    found: dict[str, list[float]] = {"rank": retrieval_ranks(scores, right).tolist()}
    for column, k in enumerate(KS):
        found[f"r{k}"] = hits[:, column].tolist()
        found[f"r{k}_ceiling"] = best[:, column].tolist()
        found[f"r{k}_chance"] = [
            1 - comb(size - np.size(r), min(k, size)) / comb(size, min(k, size)) for r in right
        ]
    return found


def _only_image(sample: Sample, scorer: str) -> ImageRef:
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

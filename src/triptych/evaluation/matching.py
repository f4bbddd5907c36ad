"""Scorers of models with a match head: a shortlist by cosine, then the head reads each pair.

Reading every pair costs images x texts; so both take the nearest `k_test` by cosine and re-rank
them by match logit + cosine, as BLIP (`train_retrieval.py`) and BLIP-2 are evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from triptych.evaluation.metrics import rerank_with_match, shortlist
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.retrieving import Gallery, Retrieve, within
from triptych.evaluation.scorers import Outcome
from triptych.evaluation.similarity import Similarity, best, cosines
from triptych.types import ImageRef, Sample

YES = 1  # the match head's column for "this text describes this image"


@dataclass
class Match(Similarity):
    """The candidate whose caption the match head likes best, among the `k_test` nearest.

    Its score is logit + cosine; candidates behind the shortlist keep the order of their cosines
    below every one that was read.
    """

    k_test: int = 16
    name: str = "match"
    needs: str = "match"

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """The best candidate of each sample, with a score for every candidate."""
        with encoding_once(predictor):
            compared = super().ask(predictor, samples)
            scores = [np.array(outcome.scores) for outcome in compared]
            chosen = [shortlist(s[None], self.k_test)[0] for s in scores]
            pairs = [
                (sample.images[0], self.captions(sample)[c])
                for sample, some in zip(samples, chosen, strict=True)
                for c in some
            ]
            refs, texts = zip(*pairs, strict=True)
            logits = predictor.match(refs, texts)[:, YES].numpy()
        parts = np.split(logits, np.cumsum([len(some) for some in chosen])[:-1])
        outcomes = []
        for sample, cosine, some, logit in zip(samples, scores, chosen, parts, strict=True):
            read = logit + cosine[some]
            joined = read.min() - 2 + cosine  # cosines lie within [-1, 1]: below all that were read
            joined[some] = read
            outcomes.append(best(sample.candidates, joined))
        return outcomes


@dataclass
class MatchRetrieve(Retrieve):
    """Retrieval both ways with a shortlist of `k_test` a query; the rest is never returned.

    The ceiling beside each recall counts what the shortlist lost. Each pair is read once, though
    both directions and a fold may have listed it. A fold has shortlists of its own.
    """

    k_test: int = 128
    name: str = "match"
    needs: str = "match"

    def scores(
        self,
        predictor: Predictor,
        refs: Sequence[ImageRef],
        captions: Sequence[str],
        galleries: Sequence[Gallery],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logit + cosine on each direction's own shortlist, -inf elsewhere: (U,C) and (C,U)."""
        with encoding_once(predictor):
            cosine = cosines(predictor.embed_images(refs), predictor.embed_texts(captions))
            rows, columns = np.nonzero(self._asked(cosine, galleries))  # image by image
            pairs = [refs[i] for i in rows], [captions[j] for j in columns]
            read = predictor.match(*pairs)[:, YES].numpy()
        logits = np.zeros(cosine.shape)
        logits[rows, columns] = read
        found = [(within(cosine, gallery), within(logits, gallery)) for gallery in galleries]
        return [
            (rerank_with_match(c, m, self.k_test), rerank_with_match(c.T, m.T, self.k_test))
            for c, m in found
        ]

    def _asked(self, cosine: np.ndarray, galleries: Sequence[Gallery]) -> np.ndarray:
        """Which pairs stand on a shortlist of either direction, of any gallery: (U,C) bool."""
        asked = np.zeros(cosine.shape, bool)
        for gallery in galleries:
            near = within(cosine, gallery)
            listed = np.zeros(near.shape, bool)
            np.put_along_axis(listed, shortlist(near, self.k_test), True, axis=1)
            np.put_along_axis(listed.T, shortlist(near.T, self.k_test), True, axis=1)
            asked[np.ix_(*gallery)] |= listed
        return asked


def encoding_once(predictor: Predictor) -> AbstractContextManager:
    """What a predictor offers to encode images once for its embeddings and its matches."""
    keeping = getattr(predictor, "keeping", None)
    return nullcontext() if keeping is None else keeping()

"""Retrieval for models that embed: every caption against every image, both ways, also in folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from triptych.evaluation.metrics import retrieval_hits, retrieval_ranks
from triptych.evaluation.predictor import Predictor
from triptych.evaluation.scorers import Outcome
from triptych.evaluation.similarity import cosines, only_image
from triptych.types import ImageRef, Sample

KS = (1, 5, 10)
Gallery = tuple[np.ndarray, np.ndarray]  # rows of images and columns of captions, ascending


@dataclass
class Retrieve:
    """Ranks all captions for every image, and all images for every caption.

    fold_size: every so many images, in their order, are ranked once more as a gallery of their own;
    images that fill no fold are in none. Null, or fewer than two folds: the whole gallery alone.
    """

    fold_size: int | None = None
    name: str = "similarity"
    needs: str = "embed"
    whole: bool = True

    def ask(self, predictor: Predictor, samples: Sequence[Sample]) -> list[Outcome]:
        """Hits, ranks, chance and ceiling of each caption; those of an image on its first one.

        The ceiling is what a perfect model reaches although captions of different images are equal.
        Those within a fold are called `fold_...`, beside the number of the `fold`.
        """
        refs = {s.images[0].key: s.images[0] for s in samples if only_image(s, self.name)}
        row = {key: i for i, key in enumerate(refs)}
        owner = np.array([row[s.images[0].key] for s in samples])
        captions = list(dict.fromkeys(sample.text for sample in samples))
        place = {caption: i for i, caption in enumerate(captions)}
        column = np.array([place[sample.text] for sample in samples])
        parts = [np.arange(len(samples)), *self._folds(owner)]  # samples of each gallery
        galleries = [(np.unique(owner[part]), np.unique(column[part])) for part in parts]
        ranked = self.scores(predictor, list(refs.values()), captions, galleries)
        names = [ref.name for ref in refs.values()]
        outcomes = [Outcome(names[int(i)]) for i in ranked[0][1][column].argmax(1)]
        for fold, part in enumerate(parts, start=-1):
            images, texts = galleries[fold + 1]
            rows, columns = (
                np.searchsorted(images, owner[part]),
                np.searchsorted(texts, column[part]),
            )
            for index, found in zip(part, _found(*ranked[fold + 1], rows, columns), strict=True):
                if fold >= 0:
                    found = {"fold": fold} | {f"fold_{key}": v for key, v in found.items()}
                outcomes[index].extra |= found
        return outcomes

    def _folds(self, owner: np.ndarray) -> list[np.ndarray]:
        """The samples of each whole fold, if there are two or more."""
        count = 0 if self.fold_size is None else (owner.max() + 1) // self.fold_size
        fold = owner // (self.fold_size or 1)
        return [np.flatnonzero(fold == number) for number in range(count)] if count > 1 else []

    def scores(
        self,
        predictor: Predictor,
        refs: Sequence[ImageRef],
        captions: Sequence[str],
        galleries: Sequence[Gallery],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each gallery how well each image fits each caption, (U,C), and each caption each
        image, (C,U).
        """
        cosine = cosines(predictor.embed_images(refs), predictor.embed_texts(captions))
        return [(part, part.T) for part in (within(cosine, gallery) for gallery in galleries)]


def within(scores: np.ndarray, gallery: Gallery) -> np.ndarray:
    """The scores of one gallery; the whole matrix is not copied."""
    rows, columns = gallery
    return scores if (len(rows), len(columns)) == scores.shape else scores[np.ix_(rows, columns)]


def _found(
    to_texts: np.ndarray, to_images: np.ndarray, owner: np.ndarray, column: np.ndarray
) -> list[dict[str, float | None]]:
    """What each caption and, on its first one, each image finds: (U,C) and (C,U) to facts a sample.

    owner, column: the image and the distinct caption of each sample.
    """
    says = np.zeros(to_texts.shape, np.float32)
    says[owner, column] = 1
    own = [np.flatnonzero(owner == u) for u in range(len(to_texts))]
    texts = _side(to_texts[:, column], own, says[:, column])
    images = _side(to_images[column], owner, says.T[column])
    made = []
    for j, u in enumerate(owner):
        facts: dict[str, float | None] = {f"t2i_{key}": value[j] for key, value in images.items()}
        first = own[u][0] == j
        facts |= {f"i2t_{key}": value[u] if first else None for key, value in texts.items()}
        made.append(facts)
    return made


def _side(scores: np.ndarray, right: Sequence, perfect: np.ndarray) -> dict[str, list[float]]:
    """What each query of one direction finds, by chance and at best; -inf is never returned."""
    perfect = np.where(np.isneginf(scores), -np.inf, perfect)
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

"""`data=shapes`: procedural scenes with captions, questions and dialogues, from a seed.

Everything of scene i is a pure function of (seed, split, i) and of the options that change what is
drawn, so no file is needed, any worker can make any item, and splits share no random stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.random import Generator
from PIL.Image import Image

from triptych.data import shapes_text as text
from triptych.data.scenes import COLORS, SHAPES, VERSION, Scene, SceneObject, render, sample_scene
from triptych.types import DataError, ImageRef, Sample, assistant, user

__all__ = ["KINDS", "SPLITS", "Scene", "SceneObject", "Shapes"]

SPLITS = ("train", "validation", "test")
KINDS = ("captions", "retrieval", "relations", "labels", "questions", "language")


class Shapes(Sequence[Sample]):
    """`size` scenes with `per_image` samples each; items are made when they are asked for.

    captions   different captions of the scene; those of one image share `cluster`
    retrieval  one full description a scene, and no two scenes of the split share it
    relations  a caption with a relation as `target`, and the swapped one beside it in `candidates`
    labels     one object a scene; `target` is its tag ("red circle"), `candidates` all tags
    questions  questions with a closed list of answers; `meta["type"]` names the ability
    language   text alone: the scene in words, then per_image questions that follow from it
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 20_000,
        seed: int = 0,
        kind: str = "questions",
        image_size: int = 64,
        per_image: int = 1,
        objects: tuple[int, int] = (1, 4),
        words: float = 0.15,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"data.split '{split}' is unknown; use one of {', '.join(SPLITS)}.")
        if kind not in KINDS:
            raise DataError(f"data.kind '{kind}' is unknown; use one of {', '.join(KINDS)}.")
        most = {"captions": 5, "questions": 16, "language": 16}.get(kind, 1)
        if not 1 <= per_image <= most:
            raise DataError(f"data.per_image of kind '{kind}' is 1 to {most}, not {per_image}.")
        if size < 1 or image_size < 16:
            raise DataError(f"data.size ({size}) must be 1 or more, image_size ({image_size}) 16.")
        self.split, self.size, self.seed, self.kind = split, size, seed, kind
        self.image_size, self.per_image, self.words = image_size, per_image, words
        self.objects = (1, 1) if kind == "labels" else (int(objects[0]), int(objects[1]))
        sample_scene(np.random.default_rng(0), self.objects, words)  # refuses bad ranges now
        self._chosen: list[int] | None = None
        self._last: tuple[int, list[Sample]] = (-1, [])

    def __len__(self) -> int:
        return self.size * (1 if self.kind == "language" else self.per_image)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")  # IndexError ends an iteration
        index %= len(self)
        if self.kind == "language":
            return self._dialogue(index)
        number, k = divmod(index, self.per_image)
        if self._last[0] != number:  # the samples of one image are made together
            self._last = number, self._samples(self._number(number))
        return self._last[1][k]

    @property
    def clusters(self) -> list[str]:
        """The scene of every sample, without making any."""
        per_item = 1 if self.kind == "language" else self.per_image
        return [str(i // per_item) for i in range(len(self))]

    def scene(self, index: int) -> Scene:
        """The scene behind samples `index * per_image` and following, with boxes and tags."""
        return self._scene(self._number(index))

    def image(self, index: int) -> ImageRef:
        """The picture of that scene; its key needs no drawing."""
        return self._image(self._number(index))

    def _image(self, number: int) -> ImageRef:
        drawn_from = (VERSION, self.seed, self.split, number, self.image_size, self.objects)
        key = hashlib.sha1(repr((*drawn_from, self.words)).encode()).hexdigest()
        return ImageRef(key, partial(self._paint, number), f"shapes/{self.split}/{number}")

    def _paint(self, number: int) -> Image:
        return render(self._scene(number), self.image_size)

    def _scene(self, number: int) -> Scene:
        return sample_scene(self._stream(number, 0), self.objects, self.words)

    def _stream(self, number: int, use: int) -> Generator:
        """Random numbers of one scene: use 0 draws it, 1 and up write about it."""
        return np.random.default_rng([VERSION, self.seed, SPLITS.index(self.split), number, use])

    def _number(self, index: int) -> int:
        """The scene number of an item: its own, unless the kind leaves scenes out."""
        if self.kind not in ("retrieval", "relations"):
            return index
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen[index]

    def _choose(self) -> list[int]:
        chosen, seen = [], set()
        for number in range(50 * self.size + 1000):
            scene = self._scene(number)
            if self.kind == "retrieval":
                words = text.describe(scene)
                fits = words not in seen
                seen.add(words)
            else:
                fits = text.related_pair(scene) is not None
            if fits:
                chosen.append(number)
                if len(chosen) == self.size:
                    return chosen
        raise DataError(
            f"data.objects {self.objects} give too few scenes of kind '{self.kind}'; "
            f"raise the number of objects or lower data.size ({self.size})."
        )

    def _samples(self, number: int) -> list[Sample]:
        scene = self._scene(number)
        rng = self._stream(number, 1 + KINDS.index(self.kind))
        made = [self._sample(number, scene) for _ in range(self.per_image)]
        if self.kind == "questions":
            for sample, q in zip(made, text.questions(scene, rng, self.per_image), strict=True):
                sample.messages = [user(q.text, images=1), assistant(q.answer)]
                sample.target, sample.candidates = q.answer, q.candidates
                sample.meta["type"] = q.type
        elif self.kind == "labels":
            made[0].target = scene.objects[0].tag
            made[0].candidates = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
            made[0].messages = [user("", images=1), assistant(made[0].target)]
        else:
            for sample, caption in zip(made, self._captions(scene, rng, made[0]), strict=True):
                sample.messages = [user("", images=1), assistant(caption)]
        for k, sample in enumerate(made):
            sample.id = f"shapes/{self.split}/{self.kind}/{number}-{k}"
        return made

    def _captions(self, scene: Scene, rng: Generator, first: Sample) -> list[str]:
        if self.kind == "captions":
            return text.captions(scene, rng, self.per_image)
        if self.kind == "retrieval":
            return [text.describe(scene)]
        first.candidates = list(text.related_pair(scene) or ())
        first.target = first.candidates[0]
        return [first.target]

    def _sample(self, number: int, scene: Scene) -> Sample:
        return Sample(
            messages=[],
            images=[replace(self._image(number), boxes=tuple(o.box for o in scene.objects))],
            tags=scene.tags,
            cluster=f"shapes/{self.split}/{number}",
            source="shapes",
            meta={"objects": len(scene.objects)},
        )

    def _dialogue(self, number: int) -> Sample:
        """A description that is asked for, or one that is given and asked about."""
        scene, rng = self._scene(number), self._stream(number, 1 + KINDS.index("language"))
        words = text.description(scene, rng)
        if rng.random() < 0.15:
            count = len(scene.objects)
            ask = f"describe a picture with {text.NUMBERS[count]} shape{'s' * (count > 1)}."
            messages = [user(ask), assistant(words)]
        else:
            messages = []
            for q in text.questions(scene, rng, self.per_image):
                messages += [user(q.text if messages else f"{words} {q.text}"), assistant(q.answer)]
        return Sample(
            messages=messages,
            tags=scene.tags,
            id=f"shapes/{self.split}/language/{number}",
            cluster=f"shapes/{self.split}/{number}",
            source="shapes",
        )

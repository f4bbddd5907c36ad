"""Samples of the capability card: procedural scenes that ask for one ability, in three grades.

Every sample is a pure function of (seed, split, ability, kind, grade, number). No scene is one of
`data=shapes`: the random streams differ, so a model trained there has seen none of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count, permutations

import numpy as np
from numpy.random import Generator

from triptych.data import shapes_text as text
from triptych.data.scenes import COLORS, SHAPES, WORDS, Scene, SceneObject, render, sample_scene
from triptych.data.shapes import SPLITS
from triptych.types import DataError, ImageRef, Sample, assistant, user

CARD = 20_001  # of the scenes' streams; raise it whenever a seed would give another sample
GRADES = ("easy", "medium", "hard")
KINDS = {
    "generation": ("caption",),
    "reading": ("word",),
    "reasoning": ("counting", "comparison", "relation"),
    "retrieval": ("caption",),
    "hallucination": ("presence",),
}
ABILITIES = tuple(KINDS)
DESCRIBE = "describe the image."
OPTIONS = 10  # captions of a retrieval question
RATIOS = {"easy": (1.7, 9.0), "medium": (1.35, 1.7), "hard": (1.15, 1.35)}  # of two sizes

Made = tuple[Scene, Sample] | None
Maker = Callable[[Generator, str, int], Made]


class CardScenes(Sequence[Sample]):
    """`size` samples of each kind and grade of one ability; `meta` holds "kind" and "grade".

    What makes a grade hard: more objects (generation, counting, relations), nearer sizes
    (comparison), texture and faint ink (reading), captions that differ in one word (retrieval),
    and absent objects whose colour and shape are both in the picture (hallucination).
    """

    def __init__(
        self,
        ability: str,
        size: int = 100,
        split: str = "test",
        seed: int = 0,
        image_size: int = 64,
    ) -> None:
        if ability not in ABILITIES:
            raise DataError(f"ability '{ability}' is unknown; use one of {', '.join(ABILITIES)}.")
        if split not in SPLITS or size < 1:
            raise DataError(f"split '{split}' must be one of {', '.join(SPLITS)}, size 1 or more.")
        self.ability, self.size, self.split = ability, size, split
        self.seed, self.image_size = seed, image_size

    def __len__(self) -> int:
        return self.size * len(KINDS[self.ability]) * len(GRADES)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self._samples[index]

    @property
    def clusters(self) -> list[str]:
        """The scene of every sample: each has its own."""
        return [sample.cluster for sample in self._samples]

    @cached_property
    def _samples(self) -> list[Sample]:
        kinds = KINDS[self.ability]
        return [s for kind in kinds for grade in GRADES for s in self._drawn(kind, grade)]

    def _drawn(self, kind: str, grade: str) -> Iterator[Sample]:
        """Scenes are drawn until enough of them fit; those that do not are left out."""
        make, found = _MAKERS[self.ability, kind], 0
        place = (ABILITIES.index(self.ability), KINDS[self.ability].index(kind))
        stream = (CARD, self.seed, SPLITS.index(self.split), *place, GRADES.index(grade))
        for number in count():
            made = make(np.random.default_rng([*stream, number]), grade, found)
            if made is None:
                continue
            scene, sample = made
            name = f"card/{self.split}/{self.ability}/{kind}-{grade}-{number}"
            key = hashlib.sha1(repr((*stream, number, self.image_size)).encode()).hexdigest()
            sample.images = [ImageRef(key, partial(render, scene, self.image_size), name)]
            sample.id = sample.cluster = name
            sample.source = "card"
            areas = {o.tag: 4 * o.radii[0] * o.radii[1] for o in scene.objects}
            sample.meta |= {"kind": kind, "grade": grade, "word": scene.word, "areas": areas}
            sample.meta["there"] = scene.tags  # not `tags`, which a model may be shown
            yield sample
            found += 1
            if found == self.size:
                return


def _caption(rng: Generator, grade: str, number: int) -> Made:
    scene = _scene(rng, {"easy": (1, 1), "medium": (2, 2), "hard": (3, 4)}[grade])
    said = text.describe(scene)
    sample = Sample([user(DESCRIBE, images=1), assistant(said)], target=said)
    sample.meta["references"] = [said, *text.captions(scene, rng, 4)]
    return scene, sample


def _word(rng: Generator, grade: str, number: int) -> Made:
    scene = sample_scene(rng, (1, 1) if grade == "easy" else (2, 2), words=1.0)
    scene = replace(scene, texture="plain" if grade == "easy" else text.pick(rng, _TEXTURES))
    if grade == "hard":
        light = scene.background[0] > 127
        ink = tuple(c - 75 if light else c + 75 for c in scene.background)
        scene = replace(scene, word_rgb=ink)
    words = f"what word is written in the {text.pick(rng, ('image', 'picture', 'scene'))}?"
    captions = [f"a picture with the word {word}" for word in WORDS]
    return scene, _asked(words, scene.word, WORDS, captions)


def _counting(rng: Generator, grade: str, number: int) -> Made:
    total = {"easy": 2, "medium": 3, "hard": 4}[grade]
    scene, hits = _scene(rng, (total, total)), int(rng.integers(total + 1))
    color, *others = [_COLORS[i] for i in rng.permutation(len(_COLORS))[: total + 1]]
    chosen = set(rng.permutation(total)[:hits].tolist())
    names = [color if i in chosen else others[i] for i in range(total)]
    scene = replace(scene, objects=tuple(map(_painted, scene.objects, names)))
    captions = [f"a picture with {n} {color} shape{'s' * (n != 'one')}" for n in text.NUMBERS]
    question = f"how many {color} shapes are there?"
    return scene, _asked(question, text.NUMBERS[hits], text.NUMBERS, captions)


def _comparison(rng: Generator, grade: str, number: int) -> Made:
    scene = _scene(rng, (2, 2))
    large, small = sorted(scene.objects, key=_area, reverse=True)
    low, high = RATIOS[grade]
    ratios = ((_area(large) / _area(small)) ** 0.5, max(large.radii) / max(small.radii))
    if large.tag == small.tag or min(ratios) < low or ratios[0] >= high:
        return None
    first, second = (large, small) if number % 2 else (small, large)
    question = f"which is larger, the {first.tag} or the {second.tag}?"
    captions = [
        f"a {a.tag} that is larger than a {b.tag}" for a, b in ((first, second), (second, first))
    ]
    return scene, _asked(question, large.tag, (first.tag, second.tag), captions)


def _relation(rng: Generator, grade: str, number: int) -> Made:
    total = {"easy": 2, "medium": 3, "hard": 4}[grade]
    scene = _scene(rng, (total, total))
    pairs = [
        (a, b, words)
        for a, b in permutations(scene.objects, 2)
        for axis in (0, 1)
        if scene.tags.count(a.tag) == scene.tags.count(b.tag) == 1
        and (words := text.relation(a, b, axis))
    ]
    if not pairs:
        return None
    a, b, words = text.pick(rng, pairs)
    opposite = text.RELATIONS[text.RELATIONS.index(words) ^ 1]
    said, other = (words, opposite) if number % 2 == 0 else (opposite, words)
    captions = [f"a {a.tag} {said} a {b.tag}", f"a {a.tag} {other} a {b.tag}"]
    question = f"is the {a.tag} {said} the {b.tag}?"
    return scene, _asked(question, text.YES_NO[number % 2], text.YES_NO, captions)


def _presence(rng: Generator, grade: str, number: int) -> Made:
    scene = _scene(rng, (2, 3))
    colors, shapes = {o.color for o in scene.objects}, {o.shape for o in scene.objects}
    absent = [
        f"{color} {shape}"
        for color in COLORS
        for shape in SHAPES
        if f"{color} {shape}" not in scene.tags
        and GRADES[(color in colors) + (shape in shapes)] == grade
    ]
    if not absent:
        return None
    tag = text.pick(rng, absent if number % 2 else scene.tags)
    question = f"is there {text.with_article(tag)} in the image?"
    captions = [f"a picture with {text.with_article(tag)}", f"a picture without a {tag}"]
    return scene, _asked(question, text.YES_NO[number % 2], text.YES_NO, captions)


def _retrieval(rng: Generator, grade: str, number: int) -> Made:
    scene = _scene(rng, (1, 2) if grade == "easy" else (2, 3))
    said = text.describe(scene)
    captions = [said]
    while len(captions) < OPTIONS:
        other = text.describe(_other(rng, scene, grade))
        captions += [other] if other not in captions else []
    order = rng.permutation(OPTIONS)
    options = [captions[i] for i in order]
    return scene, _asked(DESCRIBE, said, options, options)


def _other(rng: Generator, scene: Scene, grade: str) -> Scene:
    """Another scene (easy), this one with another object (medium) or one other word (hard)."""
    if grade == "easy":
        return _scene(rng, (len(scene.objects),) * 2)
    objects = list(scene.objects)
    at = int(rng.integers(len(objects)))
    changes = {
        "color": text.pick(rng, [c for c in _COLORS if c != objects[at].color]),
        "shape": text.pick(rng, [s for s in SHAPES if s != objects[at].shape]),
        "center": text.pick(rng, _CENTERS),
    }
    if grade == "hard":
        name = text.pick(rng, list(changes))
        changes = {name: changes[name]}
    objects[at] = replace(objects[at], **changes)
    return replace(scene, objects=tuple(objects))


def _scene(rng: Generator, objects: tuple[int, int]) -> Scene:
    return sample_scene(rng, objects, words=0.0)


def _asked(question: str, answer: str, options: Sequence[str], captions: list[str]) -> Sample:
    messages = [user(question, images=1), assistant(answer)]
    return Sample(messages, target=answer, candidates=list(options), meta={"captions": captions})


def _painted(o: SceneObject, color: str) -> SceneObject:
    return replace(o, color=color, rgb=COLORS[color][0])


def _area(o: SceneObject) -> float:
    return o.radii[0] * o.radii[1]


_TEXTURES = ("noise", "stripes", "shade")
_COLORS = [name for name in COLORS if name not in ("black", "white")]  # seen on any background
_CENTERS = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]
_MAKERS: dict[tuple[str, str], Maker] = {
    ("generation", "caption"): _caption,
    ("reading", "word"): _word,
    ("reasoning", "counting"): _counting,
    ("reasoning", "comparison"): _comparison,
    ("reasoning", "relation"): _relation,
    ("retrieval", "caption"): _retrieval,
    ("hallucination", "presence"): _presence,
}

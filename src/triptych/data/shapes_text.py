"""What can be said and asked about a scene: captions, questions with one right answer, dialogues.

Only what every reader would agree on is asked: an object is referred to by names no other object
of the scene shares, and left, right, above and below need different thirds of the picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from triptych.data.scenes import COLORS, SHAPES, WORDS, Scene, SceneObject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator

NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
YES_NO = ["yes", "no"]
_NOUNS = ("shape", "object", "figure")
_PICTURES = ("image", "picture", "scene")
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_THERE = (
    "is there {a}?",
    "is there {a} in the {picture}?",
    "is {a} present?",
    "does the {picture} contain {a}?",
    "does the {picture} show {a}?",
    "do you see {a}?",
    "can {a} be seen?",
)
_NOT_THERE = (
    "is there no {x}?",
    "is there not {a}?",
    "is there not {a} in the {picture}?",
    "is no {x} present?",
    "does the {picture} not contain {a}?",
    "does the {picture} show no {x}?",
    "is {a} missing?",
)
_COLOR = (
    "what color is the {x}?",
    "what is the color of the {x}?",
    "which color does the {x} have?",
    "which color is the {x}?",
    "tell me the color of the {x}.",
)
_SHAPE = (
    "what shape is the {x}?",
    "what is the shape of the {x}?",
    "which shape does the {x} have?",
    "tell me the shape of the {x}.",
)
_ONLY_SHAPE = (
    "what shape is in the {picture}?",
    "what shape does the {picture} contain?",
    "what shape is present?",
    "which shape do you see?",
    "which shape does the {picture} show?",
)
_COUNT = ("how many {x} are there?", "how many {x} are in the {picture}?", "count the {x}.")


class Question(NamedTuple):
    text: str
    answer: str
    type: str  # yes_no, color, shape, count, relation, position, size or word
    candidates: list[str]


def pick(rng: Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place(o: SceneObject) -> str:
    return _PLACES[o.row][o.column]


def name(o: SceneObject, size: bool = True) -> str:
    """ "small red circle"; the size is left out where it is in between."""
    return f"{o.size} {o.tag}" if size and o.size != "medium" else o.tag


def relation(a: SceneObject, b: SceneObject, axis: int) -> str:
    """What `a` is to `b` along an axis (0 = left/right, 1 = above/below); "" if not clear."""
    first, second = (a.column, b.column) if axis == 0 else (a.row, b.row)
    if abs(a.center[axis] - b.center[axis]) < 0.15 or first == second:
        return ""
    return RELATIONS[2 * axis + (first > second)]


def describe(scene: Scene) -> str:
    """Everything a question can ask about, in one sentence."""
    parts = [f"{with_article(name(o))} at the {place(o)}" for o in scene.objects]
    if scene.word:
        parts.append(f"the word {scene.word} at the {('top', 'center', 'bottom')[scene.word_row]}")
    return _join(parts)


def captions(scene: Scene, rng: Generator, count: int = 1) -> list[str]:
    """`count` different captions (at most 5), from bare names to full descriptions."""
    made: list[str] = []
    writers = (_names, _related, describe, _names_sized)
    while len(made) < count:
        writer = writers[int(rng.integers(len(writers)))]
        text = writer(scene) if writer is describe else writer(scene, rng)
        if text not in made:
            made.append(text)
    return made


def related_pair(scene: Scene) -> tuple[str, str] | None:
    """A true caption with a relation and the same with the objects' places swapped."""
    for a, b, words in _relations(scene):
        return f"{with_article(a.tag)} {words} {with_article(b.tag)}", (
            f"{with_article(b.tag)} {words} {with_article(a.tag)}"
        )
    return None


def questions(scene: Scene, rng: Generator, count: int = 1) -> list[Question]:
    """`count` different questions; half of them want yes or no, with both equally frequent."""
    makers: list[Callable[[Scene, Generator], Question | None]] = [
        _color,
        _shape,
        _count,
        _relation,
    ]
    makers += [_position, _size, _color, _shape] + ([_word] if scene.word else [])
    made: dict[str, Question] = {}
    while len(made) < count:
        maker = _exists if rng.random() < 0.5 else pick(rng, makers)
        question = maker(scene, rng)
        if question is not None:
            made.setdefault(question.text, question)
    return list(made.values())


def description(scene: Scene, rng: Generator) -> str:
    """The whole scene in words, as a sentence, a list or a grid of nine places."""
    style = rng.random()
    if style < 0.4:
        return f"the {pick(rng, _PICTURES)} shows {describe(scene)}."
    parts = [(o.row, o.column, name(o)) for o in scene.objects]
    if scene.word:
        parts.append((scene.word_row, 1, f"the word {scene.word}"))
    if style < 0.7:
        order = rng.permutation(len(parts))
        lines = [f"{_PLACES[parts[k][0]][parts[k][1]]}: {parts[k][2]}." for k in order]
        return " ".join(lines)
    rows = []
    for r in range(3):
        cells = [" and ".join(t for y, x, t in parts if (y, x) == (r, c)) for c in range(3)]
        rows.append(" | ".join(cell or "empty" for cell in cells))
    return " / ".join(rows)


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _names(scene: Scene, rng: Generator) -> str:
    text = _join([with_article(o.tag) for o in scene.objects])
    if scene.word and rng.random() < 0.5:
        text += f" with the word {scene.word}"
    lead = rng.random()
    if lead < 0.6:
        return text
    return f"{pick(rng, _PICTURES)} of {text}" if lead < 0.8 else f"there is {text}"


def _names_sized(scene: Scene, rng: Generator) -> str:
    text = _join([with_article(name(o)) for o in scene.objects])
    return f"{NUMBERS[len(scene.objects)]} {_plural('shape', scene)}: {text}"


def _related(scene: Scene, rng: Generator) -> str:
    pairs = _relations(scene)
    if not pairs:
        return _join([f"{with_article(o.tag)} at the {place(o)}" for o in scene.objects])
    a, b, words = pick(rng, pairs)
    rest = [with_article(o.tag) for o in scene.objects if o is not a and o is not b]
    return _join([f"{with_article(a.tag)} {words} {with_article(b.tag)}", *rest])


def _plural(noun: str, scene: Scene) -> str:
    return noun if len(scene.objects) == 1 else noun + "s"


def _relations(scene: Scene) -> list[tuple[SceneObject, SceneObject, str]]:
    """All clear relations between objects that their names tell apart."""
    unique = [o for o in scene.objects if scene.tags.count(o.tag) == 1]
    pairs = [(a, b) for a in unique for b in unique if a is not b]
    return [(a, b, w) for a, b in pairs for axis in (0, 1) if (w := relation(a, b, axis))]


def _fill(rng: Generator, templates: Sequence[str], x: str) -> str:
    return pick(rng, templates).format(x=x, a=with_article(x), picture=pick(rng, _PICTURES))


def _exists(scene: Scene, rng: Generator) -> Question:
    """Is there such an object? One that is there and one that is not are equally frequent."""
    there, negated = bool(rng.random() < 0.5), bool(rng.random() < 0.2)
    level = int(rng.integers(3))  # 0: colour, 1: shape, 2: both
    while True:
        o = pick(rng, scene.objects)
        color, shape = o.color, o.shape
        if not there:  # wrong in one attribute, or in both
            change = level if level < 2 else int(rng.integers(3))
            color = pick(rng, list(COLORS)) if change != 1 else color
            shape = pick(rng, SHAPES) if change != 0 else shape
        if level == 0:
            found, x = any(p.color == color for p in scene.objects), f"{color} {pick(rng, _NOUNS)}"
        elif level == 1:
            found, x = any(p.shape == shape for p in scene.objects), shape
        else:
            found, x = f"{color} {shape}" in scene.tags, f"{color} {shape}"
        if found == there:
            text = _fill(rng, _NOT_THERE if negated else _THERE, x)
            return Question(text, "yes" if there != negated else "no", "yes_no", YES_NO)


def _color(scene: Scene, rng: Generator) -> Question | None:
    """The colour of the only object, of the only one of its shape, or of one in a place."""
    o = pick(rng, scene.objects)
    if len(scene.objects) == 1 and rng.random() < 0.5:
        x = pick(rng, _NOUNS)
    elif sum(p.shape == o.shape for p in scene.objects) == 1:
        x = o.shape
    elif sum(place(p) == place(o) for p in scene.objects) == 1:
        x = f"{pick(rng, _NOUNS)} at the {place(o)}"
    else:
        return None
    return Question(_fill(rng, _COLOR, x), o.color, "color", list(COLORS))


def _shape(scene: Scene, rng: Generator) -> Question | None:
    o = pick(rng, scene.objects)
    if len(scene.objects) == 1 and rng.random() < 0.5:
        return Question(_fill(rng, _ONLY_SHAPE, "shape"), o.shape, "shape", list(SHAPES))
    if sum(p.color == o.color for p in scene.objects) == 1:
        x = f"{o.color} {pick(rng, _NOUNS)}"
    elif sum(place(p) == place(o) for p in scene.objects) == 1:
        x = f"{pick(rng, _NOUNS)} at the {place(o)}"
    else:
        return None
    return Question(_fill(rng, _SHAPE, x), o.shape, "shape", list(SHAPES))


def _count(scene: Scene, rng: Generator) -> Question:
    what, o = rng.random(), pick(rng, scene.objects)
    if what < 0.4:
        x, number = f"{pick(rng, _NOUNS)}s", len(scene.objects)
    elif what < 0.7:
        shape = o.shape if rng.random() < 0.8 else pick(rng, SHAPES)
        x = shape + ("es" if shape == "cross" else "s")
        number = sum(p.shape == shape for p in scene.objects)
    else:
        color = o.color if rng.random() < 0.8 else pick(rng, list(COLORS))
        x = f"{color} {pick(rng, _NOUNS)}s"
        number = sum(p.color == color for p in scene.objects)
    return Question(_fill(rng, _COUNT, x), NUMBERS[number], "count", list(NUMBERS))


def _relation(scene: Scene, rng: Generator) -> Question | None:
    pairs = _relations(scene)
    if not pairs:
        return None
    a, b, words = pick(rng, pairs)
    right = rng.random() < 0.5
    asked = words if right else RELATIONS[RELATIONS.index(words) ^ 1]
    text = f"is the {a.tag} {asked} the {b.tag}?"
    return Question(text, "yes" if right else "no", "relation", YES_NO)


def _position(scene: Scene, rng: Generator) -> Question | None:
    o = pick(rng, scene.objects)
    if scene.tags.count(o.tag) > 1:
        return None
    if rng.random() < 0.5:
        where, options = o.column, ["left", "center", "right"]
        text = f"is the {o.tag} on the left, in the center or on the right?"
    else:
        where, options = o.row, ["top", "center", "bottom"]
        text = f"is the {o.tag} at the top, in the center or at the bottom?"
    return Question(text, options[where], "position", options)


def _size(scene: Scene, rng: Generator) -> Question | None:
    o = pick(rng, scene.objects)
    if o.size == "medium" or scene.tags.count(o.tag) > 1:
        return None
    text = pick(rng, ("is the {} small or large?", "what size is the {}?")).format(o.tag)
    return Question(text, o.size, "size", ["small", "large"])


def _word(scene: Scene, rng: Generator) -> Question:
    text = pick(rng, ("what word is written in the {}?", "which word do you read in the {}?"))
    return Question(text.format(pick(rng, _PICTURES)), scene.word, "word", list(WORDS))

"""CHAIR, objects that captions invent (Rohrbach et al. 2018)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from triptych.evaluation.metrics._shared import mistake, same_ids

SINGULARIZER = "triptych-suffix-1"
SYNONYMS = "triptych-coco80-1"  # the default table; the paper's own file gives other values

# One line an object of COCO: its name, then words that mean it. The paper's larger table can be
# read from its file with `read_synonyms`.
_COCO = """
person, people, man, woman, boy, girl, child, children, kid, baby, adult, lady, guy, player,
    skier, snowboarder, surfer, skateboarder, rider, worker, officer, driver, passenger, student
bicycle, bike
car, automobile, sedan, suv, taxi, cab, van, jeep
motorcycle, motorbike, motor bike, motor cycle, scooter, moped
airplane, aeroplane, air plane, plane, jet, aircraft, airliner
bus, minibus
train, locomotive
truck, lorry, pickup
boat, ship, sailboat, canoe, kayak, yacht, ferry
traffic light, traffic signal, stop light, stoplight, street light, streetlight
fire hydrant, hydrant
stop sign
parking meter
bench
bird, duck, goose, seagull, gull, pigeon, parrot, owl, swan, sparrow, eagle
cat, kitten, kitty
dog, puppy, pup
horse, pony, foal
sheep, lamb
cow, cattle, bull, calf, ox
elephant
bear, panda
zebra
giraffe
backpack, knapsack, rucksack
umbrella, parasol
handbag, purse
tie, necktie, bow tie
suitcase, suit case, luggage
frisbee
skis, ski
snowboard
sports ball, ball
kite
baseball bat
baseball glove
skateboard
surfboard
tennis racket, racket, tennis racquet, racquet
bottle
wine glass
cup, mug
fork
knife
spoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut
cake, cupcake
chair, stool, seat
couch, sofa
potted plant, houseplant
bed
dining table, table, desk
toilet
tv, television, monitor
laptop, laptop computer, notebook, computer
mouse
remote
keyboard
cell phone, mobile phone, phone, cellphone, smartphone, telephone
microwave
oven, stove
toaster
sink
refrigerator, fridge, freezer
book
clock
vase
scissors
teddy bear, teddybear
hair drier, hair dryer, hairdryer
toothbrush
"""
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
_IRREGULAR = {"mice": "mouse", "geese": "goose", "oxen": "ox", "feet": "foot", "teeth": "tooth"}
_WORD = re.compile(r"\w+(?:-\w+)*")


def _table(text: str) -> dict[str, str]:
    lines = (line.strip().split(", ") for line in text.splitlines() if line.strip())
    return {name: names[0] for names in lines for name in names}


@lru_cache(maxsize=1)
def coco_synonyms() -> dict[str, str]:
    """The default table, word -> COCO object (80 objects and common words for them)."""
    return _table(re.sub(r",\s*\n\s+", ", ", _COCO))


def read_synonyms(path: str | Path) -> dict[str, str]:
    """Read a table word -> object from a file: a line an object, its name first, then ", word".

    This is the layout of the `synonyms.txt` that CHAIR's authors publish. As in their code, a word
    after two blanks is never found ("cheesecake" in their file).
    """
    path = Path(path)
    if not path.is_file():
        raise mistake(f"CHAIR synonyms '{path}' does not exist; check the path.")
    return _table(path.read_text(encoding="utf-8"))


def _pairs(synonyms: Mapping[str, str]) -> dict[str, str]:
    """Two words that count as one: those of the table, and qualifiers that are no person."""
    pairs = {name: name for name in synonyms if name.count(" ") == 1}
    for animal in _ANIMALS.split():
        pairs |= {f"baby {animal}": animal, f"adult {animal}": animal}
    pairs |= {"passenger jet": "jet", "passenger train": "train"}
    pairs |= {pair: pair for pair in ("home plate", "motor bike", "motor cycle")}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet"}


def _singular(word: str, known: set[str]) -> str:
    """The known word of which `word` is a plural, else the word itself."""
    forms = [word, _IRREGULAR.get(word, word)]
    if word.endswith("men"):
        forms.append(word[:-3] + "man")
    if word.endswith("s"):
        forms.append(word[:-1])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.append(word[:-2])
    return next((form for form in forms if form in known), word)


def mentioned_objects(caption: str, synonyms: Mapping[str, str] | None = None) -> list[str]:
    """The objects a caption mentions, in order, one entry a mention."""
    synonyms = coco_synonyms() if synonyms is None else synonyms
    pairs = _pairs(synonyms)
    known = set(synonyms) | {part for pair in pairs for part in pair.split()}
    words = [_singular(word, known) for word in _WORD.findall(caption.lower())]
    joined, i = [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        joined.append(pairs.get(pair, words[i]))
        i += 2 if pair in pairs else 1
    if "toilet" in joined:  # the seat of a toilet is no chair
        joined = [word for word in joined if word != "seat"]
    return [synonyms[word] for word in joined if word in synonyms]


def chair(
    captions: Mapping[Hashable, str],
    objects: Mapping[Hashable, Sequence[str]],
    references: Mapping[Hashable, Sequence[str]],
    synonyms: Mapping[str, str] | None = None,
) -> tuple[dict[str, float], dict[Hashable, dict[str, Any]]]:
    """Count invented objects: `chair_i` over mentions, `chair_s` over captions; lower is better.

    The truth of an image is its annotated `objects` together with every object its reference
    captions mention. A caption without objects counts in `chair_s`; without any mention `chair_i`
    is 0. Both rise with length, so `recall`, `words` a caption and `mentions` stand beside them.
    Returns the corpus values and, by id, `mentions`, `invented` and `missed`.
    """
    same_ids(captions, objects, "chair")
    same_ids(captions, references, "chair")
    synonyms = coco_synonyms() if synonyms is None else synonyms
    details: dict[Hashable, dict[str, Any]] = {}
    truths = found = words = 0
    for key, caption in captions.items():
        truth = {synonyms.get(name.lower(), name.lower()) for name in objects[key]}
        for reference in references[key]:
            truth.update(mentioned_objects(reference, synonyms))
        mentions = mentioned_objects(caption, synonyms)
        details[key] = {
            "mentions": mentions,
            "invented": [name for name in mentions if name not in truth],
            "missed": sorted(truth - set(mentions)),
        }
        truths, found = truths + len(truth), found + len(truth & set(mentions))
        words += len(caption.split())
    mentions_all = sum(len(d["mentions"]) for d in details.values())
    invented_all = sum(len(d["invented"]) for d in details.values())
    corpus = {
        "chair_i": invented_all / max(1, mentions_all),
        "chair_s": sum(bool(d["invented"]) for d in details.values()) / len(details),
        "recall": found / max(1, truths),
        "words": words / len(details),
        "mentions": mentions_all,
        "n": len(details),
    }
    return corpus, details

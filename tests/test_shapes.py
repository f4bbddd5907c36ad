"""The procedural scenes: the same from the same seed, drawn where they say, with true answers."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from triptych.data import shapes_text as text
from triptych.data.scenes import COLORS, SHAPES, render, sample_scene
from triptych.data.shapes import KINDS, Shapes
from triptych.types import DataError


def scenes(count: int, **options) -> list:
    return [sample_scene(np.random.default_rng(i), **options) for i in range(count)]


def test_an_item_depends_on_seed_split_and_index_alone():
    data, again = Shapes(size=50, per_image=3), Shapes(size=1000, per_image=3)
    assert [again[i].text for i in (140, 7)] == [data[i].text for i in (140, 7)]  # any order
    picture = np.asarray(data[7].images[0].open())
    copy = pickle.loads(pickle.dumps(data))  # as a worker process gets it
    assert np.array_equal(np.asarray(copy[7].images[0].open()), picture)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    for other in (Shapes(seed=1), Shapes(split="test"), Shapes(split="validation")):
        assert other.scene(2) != data.scene(2)
        assert other.image(2).key != data.image(2).key


def test_keys_tell_pictures_apart_and_are_shared_by_the_samples_of_one():
    keys = [Shapes(size=60, per_image=2)[i].images[0].key for i in range(120)]
    assert len(set(keys)) == 60 and keys[0::2] == keys[1::2]
    assert Shapes(kind="captions").image(0).key == keys[0]  # equal pictures, whatever is asked
    for change in ({"image_size": 32}, {"objects": (2, 3)}, {"words": 0.9}):
        assert Shapes(**change).image(0).key != keys[0]
    assert Shapes(image_size=32).image(0).open().size == (32, 32)


def test_objects_lie_in_their_boxes_and_never_touch():
    for scene in scenes(300):
        for o in scene.objects:
            assert min(o.box) >= -1e-9 and max(o.box) <= 1 + 1e-9
        boxes = [o.box for o in scene.objects] + ([scene.word_box] if scene.word else [])
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_the_picture_shows_the_named_colour_where_the_box_says():
    seen = set()
    for scene in scenes(400, objects=(1, 2), words=0.0):
        if scene.texture != "plain":
            continue
        pixels = np.asarray(render(scene, 96)).astype(int)
        changed = np.abs(pixels - np.array(scene.background)).sum(-1) > 0
        inside = np.zeros_like(changed)
        for o in scene.objects:
            left, top, right, bottom = (round(v * 96) for v in o.box)
            cut = slice(max(top - 1, 0), bottom + 2), slice(max(left - 1, 0), right + 2)
            inside[cut] = True
            hits = np.abs(pixels[cut] - np.array(o.rgb)).sum(-1) == 0
            full = (right - left) * (bottom - top)
            assert hits.sum() > 0.1 * full, (o.shape, hits.sum(), full)
            first, second = np.array(COLORS[o.color])
            assert (np.array(o.rgb) >= np.minimum(first, second) - 9).all()
            assert (np.array(o.rgb) <= np.maximum(first, second) + 9).all()
            seen.add((o.shape, o.color))
        assert not (changed & ~inside).any()
    assert {s for s, _ in seen} == set(SHAPES) and {c for _, c in seen} == set(COLORS)


def test_a_word_is_written_in_its_box():
    with_words = [s for s in scenes(200, objects=(1, 1), words=1.0) if s.texture == "plain"]
    for scene in with_words[:40]:
        assert scene.word
        left, top, right, bottom = (round(v * 64) for v in scene.word_box)
        box = np.asarray(render(scene)).astype(int)[top:bottom, left:right]
        assert (np.abs(box - np.array(scene.background)).sum(-1) > 60).sum() > 15


def truth(q: text.Question, scene) -> str:
    """Answer a question from its words and the scene, in another way than the writer did."""
    words = q.text.rstrip("?.").split()
    here = [w for w in words if w in COLORS], [w for w in words if w in SHAPES]
    found = [
        o
        for o in scene.objects
        if (not here[0] or o.color in here[0]) and (not here[1] or o.shape in here[1])
    ]
    if q.type == "yes_no":
        negated = any(w in ("no", "not", "missing") for w in words)
        return "yes" if bool(found) != negated else "no"
    if q.type == "relation":
        a, b = (
            next(o for o in scene.objects if o.tag == f"{c} {s}")
            for c, s in zip(*here, strict=True)
        )
        axis = 0 if "left" in words or "right" in words else 1
        forward = "left" in words or "above" in words
        return "yes" if (a.center[axis] < b.center[axis]) == forward else "no"
    if " at the " in q.text and q.type in ("color", "shape"):
        where = q.text.rstrip("?.").split(" at the ")[1].split(" have")[0]
        found = [o for o in found if text.place(o) == where]
    assert len(found) == 1, (q, scene)  # the referent is unique
    return {"color": found[0].color, "shape": found[0].shape, "size": found[0].size}[q.type]


def test_answers_are_true_unique_and_in_their_candidates():
    asked = {}
    for k, scene in enumerate(scenes(400)):
        for q in text.questions(scene, np.random.default_rng([k, 1]), 8):
            assert q.answer in q.candidates, q
            asked.setdefault(q.type, []).append(q)
            if q.type in ("yes_no", "relation", "color", "shape", "size"):
                assert truth(q, scene) == q.answer, (q, scene)
            elif q.type == "word":
                assert q.answer == scene.word
            elif q.type == "count":
                named = [n for n in (*COLORS, *SHAPES) if n in q.text]
                number = sum(all(n in o.tag for n in named) for o in scene.objects)
                assert q.answer == text.NUMBERS[number], (q, scene)
            elif q.type == "position":
                o = next(o for o in scene.objects if o.tag in q.text)
                line = o.center[0] if "left" in q.candidates else o.center[1]
                assert q.answer == q.candidates[o.column if "left" in q.candidates else o.row]
                assert (line < 0.5) == (q.answer in ("left", "top")) or q.answer == "center"
    kinds = {"yes_no", "color", "shape", "count", "relation", "position", "size", "word"}
    assert set(asked) == kinds
    yes = np.mean([q.answer == "yes" for q in asked["yes_no"]])
    negated = [q for q in asked["yes_no"] if " no " in q.text or " not " in q.text]
    assert 0.44 < yes < 0.56
    assert 0.4 < np.mean([q.answer == "yes" for q in negated]) < 0.6


def test_captions_of_an_image_differ_and_share_a_cluster():
    data = Shapes(kind="captions", size=100, per_image=5)
    for i in range(0, 500, 5):
        group = [data[i + k] for k in range(5)]
        assert len({s.text for s in group}) == 5 and len({s.cluster for s in group}) == 1
        assert len({s.id for s in group}) == 5
        tags = [tag for tag in group[0].tags if tag in group[0].text]
        assert tags, group[0]


def test_retrieval_captions_are_distinct_and_describe_their_scene():
    data = Shapes(kind="retrieval", split="test", size=400, objects=(1, 2))
    assert len({data[i].text for i in range(400)}) == 400
    for i in range(0, 400, 40):
        assert data[i].text == text.describe(data.scene(i))
        assert data[i].images[0].key == data.image(i).key


def test_relation_captions_differ_by_order_alone():
    data = Shapes(kind="relations", size=50)
    for i in range(50):
        right, wrong = data[i].candidates
        assert data[i].target == right == data[i].text != wrong
        assert sorted(right.replace("an ", "a ").split()) == sorted(
            wrong.replace("an ", "a ").split()
        )


def test_labels_show_one_object():
    data = Shapes(kind="labels", size=30)
    for i in range(30):
        assert data[i].tags == [data[i].target] and data[i].target in data[i].candidates
    assert len(data[0].candidates) == len(COLORS) * len(SHAPES)


def test_dialogues_are_text_that_holds_the_answer():
    data = Shapes(kind="language", size=300, per_image=6)
    assert len(data) == 300
    for i in range(300):
        sample = data[i]
        assert not sample.images and [m["role"] for m in sample.messages[-2:]] == [
            "user",
            "assistant",
        ]
        words = sample.text
        for o in data.scene(i).objects:
            assert o.tag in words and text.place(o).split()[-1] in words or " | " in words


@pytest.mark.parametrize(
    "options, name",
    [
        ({"split": "val"}, "data.split"),
        ({"kind": "caption"}, "data.kind"),
        ({"kind": "captions", "per_image": 6}, "data.per_image"),
        ({"size": 0}, "data.size"),
        ({"objects": (3, 2)}, "objects"),
        ({"objects": (0, 2)}, "objects"),
    ],
)
def test_wrong_options_are_named(options, name):
    with pytest.raises(DataError, match=name):
        Shapes(**options)


def test_too_few_scenes_is_said_not_looped():
    with pytest.raises(DataError, match="too few scenes"):
        len(Shapes(kind="relations", size=3, objects=(1, 1))[0].text)


def test_indices_outside_are_refused_so_that_iteration_ends():
    assert all(len(list(Shapes(kind=k, size=3))) == 3 for k in KINDS)
    data = Shapes(size=3)
    assert data[-1].id == data[2].id
    for index in (3, -4):
        with pytest.raises(IndexError):
            data[index]

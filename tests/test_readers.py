"""Readers: layouts, images and the sentences that bad input gets."""

from __future__ import annotations

import io
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.images import open_image, resolve_inside
from triptych.data.readers import EasyVQA, Instructions
from triptych.types import DataError

QA = "User: what is it?\nAssistant: a cat"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with pictures a.png and b.jpg, and a file beside it that must stay out."""
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(root / "pictures/a.png")
    Image.new("RGB", (6, 8), "blue").save(root / "pictures/b.jpg")
    Image.new("RGB", (4, 4), "green").save(tmp_path / "secret.png")
    return root


def write(folder: Path, *rows: dict | str, name: str = "train.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(folder: Path, *rows: dict | str, match: str, name: str = "train.jsonl") -> None:
    with pytest.raises(DataError, match=match) as caught:
        data = Instructions(write(folder, *rows, name=name), folder / "pictures")
        for sample in data:
            for image in sample.images:
                image.open()
    assert "\n" not in str(caught.value)


# --- easy-VQA -----------------------------------------------------------------------------------


def test_easy_vqa_is_the_package() -> None:
    start = time.perf_counter()
    train, test = EasyVQA("train"), EasyVQA("test")
    assert time.perf_counter() - start < 2
    assert (len(train), len(test)) == (38_575, 9_673)
    assert (len(set(train.clusters)), len(set(test.clusters))) == (4_000, 1_000)
    sample = test[3]
    assert sample.id == "easy_vqa/test/3" and sample.cluster == test.clusters[3]
    assert sample.text == "does the image contain a circle? no" and sample.target == "no"
    assert sample.messages[0]["content"][0] == {"type": "image"} and len(sample.candidates) == 13
    assert sample.images[0].open().size == (64, 64)
    assert sample.images[0] is test[0].images[0], "questions of one image share its reference"
    assert test[-1].id == "easy_vqa/test/9672"
    with pytest.raises(IndexError):
        test[9_673]


def test_easy_vqa_types_limit_and_split() -> None:
    few = EasyVQA("test", limit=1_500)
    types = {sample.target: sample.meta["type"] for sample in few}
    assert len(few) == 1_500 and len(types) == 13
    assert types["yes"] == types["no"] == "yes_no"
    assert types["circle"] == "shape" and types["gray"] == "color"
    with pytest.raises(DataError, match="no split 'val'"):
        EasyVQA("val")


def test_samples_travel_to_spawned_workers() -> None:
    sample = pickle.loads(pickle.dumps(EasyVQA("test", limit=1)[0]))
    assert sample.images[0].open().mode == "RGB"


# --- layouts ------------------------------------------------------------------------------------


def roles(sample) -> list[tuple[str, str]]:
    kinds = {"image": "[i]"}
    return [
        (m["role"], "".join(kinds.get(p["type"]) or p["text"] for p in m["content"]))
        for m in sample.messages
    ]


def test_the_three_layouts_say_the_same(folder: Path) -> None:
    text = {"image": "a.png", "text": "User: 무엇?\nAssistant: 고양이\nUser: sure?\nAssistant: yes"}
    llava = {
        "id": 7,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\n무엇?"},
            {"from": "gpt", "value": "고양이"},
            {"from": "human", "value": "sure?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "무엇?"}]
    chat = {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "고양이"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ]
    }
    rows = [text, llava, chat]
    lines = Instructions(write(folder, *rows), folder / "pictures")
    items = Instructions(write(folder, json.dumps(rows), name="a.json"), folder / "pictures")
    expected = [
        ("user", "[i]무엇?"),
        ("assistant", "고양이"),
        ("user", "sure?"),
        ("assistant", "yes"),
    ]
    for data in (lines, items):
        assert [roles(sample) for sample in data] == [expected] * 3
        assert {sample.images[0].key for sample in data} == {data[0].images[0].key}
        assert data.clusters == [sample.cluster for sample in data] == ["a.png"] * 3
        assert {sample.target for sample in data} == {"yes"}
    assert [sample.id for sample in lines] == ["train/0", "train/1:7", "train/2"]


def test_no_image_several_images_and_marks_in_the_middle(folder: Path) -> None:
    rows = [
        {"text": QA},
        {"image": ["a.png", "b.jpg"], "text": QA},
        {
            "images": ["b.jpg", "a.png"],
            "text": "System: be brief\nUser: <image> or <image>?\nAssistant: first:\nthe left",
            "candidates": ["left", "right"],
            "level": 3,
        },
    ]
    none, two, middle = Instructions(write(folder, *rows), folder / "pictures")
    assert none.images == [] and none.cluster == "train/0"
    assert roles(two)[0] == ("user", "[i][i]what is it?")
    assert [image.open().size for image in two.images] == [(8, 6), (6, 8)]
    assert roles(middle) == [
        ("system", "be brief"),
        ("user", "[i] or [i]?"),
        ("assistant", "first:\nthe left"),
    ]
    assert [image.name for image in middle.images] == ["b.jpg", "a.png"]
    assert middle.candidates == ["left", "right"] and middle.meta == {"level": 3}


def test_blank_lines_byte_order_mark_and_limit(folder: Path) -> None:
    path = folder / "bom.jsonl"
    row = json.dumps({"text": QA}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row + b"\n   \n" + row)
    assert len(Instructions(path)) == 3 and len(Instructions(path, limit=2)) == 2
    assert [sample.target for sample in Instructions(path)] == ["a cat"] * 3


# --- bad input ----------------------------------------------------------------------------------

GOOD = {"text": QA}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"id": "x9", "image": "no.png", "text": QA}, "sample 'x9' .*no.png.* does not exist"),
        ({"image": "../../secret.png", "text": QA}, "line 2 .*leaves it"),
        ({"image": "/etc/passwd", "text": QA}, "line 2 .*leaves it"),
        ({"image": "a\0.png", "text": QA}, "line 2 .*not a usable path"),
        ({"image": "", "text": "User: <image>?\nAssistant: b"}, "1 <image> marks and 0 images"),
        ({"image": "a.png", "text": "User: <image><image>\nAssistant: b"}, "2 .* marks and 1 im"),
        ({"images": ["a.png", "b.jpg"], "text": "User: <image>?\nAssistant: b"}, "1 .* and 2 im"),
        ({"image": "http://x.org/a.png", "text": QA}, "is no file; save it"),
        ({"image": 5, "text": QA}, "'5' is no path"),
        ({"image": "a.png", "images": ["a.png"], "text": QA}, "both 'image' and 'images'"),
        ({"text": "User: hello"}, "no assistant turn"),
        ({"text": "User: hello\nAssistant:  "}, "only empty assistant turns"),
        ({"text": "hello"}, "does not start with 'User:'"),
        ({"text": ""}, "empty dialogue"),
        ({"messages": []}, "empty dialogue"),
        ({"conversations": "hello"}, "no list of turns"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, "from='robot'; use one of user"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "no text or image"),
        ({"messages": [{"role": "user"}]}, "no text; give"),
        ({"prompt": "hello"}, "no 'messages', 'conversations' or 'text'"),
        ('{"text": ', "line 2 .*no valid JSON .*column"),
        ("[1]", "line 2 .*no JSON object"),
    ],
)
def test_a_bad_row_is_named(folder: Path, row: dict | str, match: str) -> None:
    refused(folder, GOOD, row, match=match)


def test_bad_files_are_named(folder: Path, tmp_path: Path) -> None:
    refused(folder, '{"text": 1}', match="no JSON list", name="a.json")
    refused(folder, "[1,", match=r"a\.json' is no valid JSON \(.* at line 2", name="a.json")
    refused(folder, "", match="holds no sample")
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(DataError, match="line 1 .*not UTF-8"):
        Instructions(folder / "latin.jsonl")
    with pytest.raises(DataError, match=r"does not exist; set data\.path"):
        Instructions(folder / "none.jsonl")
    with pytest.raises(DataError, match=r"correct data\.images"):
        Instructions(write(folder, GOOD), tmp_path / "none")


def test_rows_beyond_the_check_are_read_later(folder: Path) -> None:
    path = write(folder, GOOD, GOOD, GOOD, {"text": "hello"})
    data = Instructions(path, check=2)
    assert data[2].target == "a cat"
    with pytest.raises(DataError, match="line 4"):
        data[3]


def test_corrupt_pictures_are_named_with_their_sample(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "JPEG")
    (folder / "pictures/cut.jpg").write_bytes(whole.getvalue()[:1500])
    (folder / "pictures/text.jpg").write_text("not a picture")
    (folder / "pictures/empty.png").write_bytes(b"")
    refused(folder, {"id": "c", "image": "cut.jpg", "text": QA}, match="'c' .*cut.jpg.*truncated")
    refused(folder, {"id": "t", "image": "text.jpg", "text": QA}, match="'t' .*no picture")
    refused(folder, {"id": "e", "image": "empty.png", "text": QA}, match="'e' .*no picture")
    refused(folder, {"id": "d", "image": ".", "text": QA}, match="'d' .*is no file")


# --- pictures and paths -------------------------------------------------------------------------


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(bomb, "PNG")
    with pytest.raises(DataError, match="more than 64,000,000 pixels"):
        open_image(bomb.getvalue())
    with pytest.raises(DataError, match="more than 50 pixels"):
        open_image(_png(Image.new("RGB", (8, 8))), max_pixels=50)


def test_every_mode_becomes_upright_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "LA", "RGBA"):
        assert open_image(_png(Image.new(mode, (4, 3)))).mode == "RGB"
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array(open_image(_png(Image.fromarray(ramp))))[..., 0].tolist() == (
        np.arange(256).reshape(16, 16).tolist()
    )
    turned = Image.new("RGB", (4, 3))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (3, 4)
    with pytest.raises(DataError, match=r"nothing\.png' does not exist"):
        open_image(tmp_path / "nothing.png")


def test_paths_stay_inside_their_root(folder: Path, tmp_path: Path) -> None:
    root = folder / "pictures"
    assert resolve_inside("a.png", root) == (root / "a.png").resolve()
    assert resolve_inside(root / "a.png", root) == (root / "a.png").resolve()
    assert resolve_inside("../pictures/b.jpg", root).name == "b.jpg"
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to("loop.png")
    for path in ("link.png", "../../secret.png", tmp_path / "secret.png", "../gone.png"):
        with pytest.raises(DataError, match="leaves it"):
            resolve_inside(path, root)
    for path in ("loop.png", "a\0b.png", "x" * 5000):
        with pytest.raises(DataError, match="image path"):
            resolve_inside(path, root)
    with pytest.raises(DataError, match="does not exist"):
        resolve_inside("gone.png", root)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

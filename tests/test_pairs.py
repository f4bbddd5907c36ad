"""Image-caption pairs: every layout gives the same samples, and mistakes are named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.data.pairs import Captions, ImageFolder
from triptych.data.stream import StreamModule, find_shards, read_shards
from triptych.types import Batch, DataError, Tokens, TriptychError

ROWS = [("a.png", "a red square"), ("a.png", "red, all of it"), ("b.png", "a blue square")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, layout: str) -> Path:
    path = folder / f"pairs.{layout.partition(' ')[0]}"
    if layout == "jsonl":
        path.write_text("\n".join(json.dumps({"image": i, "caption": c}) for i, c in ROWS))
    elif layout == "json":
        both = [{"image": "a.png", "caption": [ROWS[0][1], ROWS[1][1]]}]
        path.write_text(json.dumps([*both, {"image": "b.png", "caption": ROWS[2][1]}]))
    elif layout in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            rows = csv.writer(file, delimiter="," if layout == "csv" else "\t")
            rows.writerows([("image", "caption"), *ROWS])
    elif layout == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        images, captions = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"image": images, "caption": captions}), path)
    elif layout == "json coco":
        images = [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}]
        notes = [
            {"image_id": 7 if i == "a.png" else 9, "caption": c, "id": k}
            for k, (i, c) in enumerate(ROWS)
        ]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    elif layout == "json karpathy":
        images = [
            {
                "filename": name,
                "split": "test",
                "sentences": [{"raw": c} for i, c in ROWS if i == name],
            }
            for name in ("a.png", "b.png")
        ]
        path.write_text(json.dumps({"images": [*images, {**images[0], "split": "train"}]}))
    elif layout == "token":
        path.write_text("".join(f"{i}#{k}\t{c}\n" for k, (i, c) in enumerate(ROWS)))
    elif layout == "csv flickr30k":
        lines = [f"{i}| {k}| {c}" for k, (i, c) in enumerate(ROWS)]
        path.write_text("\n".join(["image_name| comment_number| comment", *lines]))
    return path


LAYOUTS = ["jsonl", "json", "csv", "tsv", "parquet", "json coco", "token", "csv flickr30k"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "json karpathy"])
def test_every_layout_gives_the_same_pairs(folder, layout):
    split = "test" if layout == "json karpathy" else None
    reader = Captions(write(folder, layout), split=split)
    assert [s.text for s in reader] == [caption for _, caption in ROWS]
    assert reader.clusters == ["a.png", "a.png", "b.png"] == [s.cluster for s in reader]
    assert reader[0].images[0].key == reader[1].images[0].key != reader[2].images[0].key
    assert reader[2].images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert len({s.id for s in reader}) == 3


def test_pictures_inside_parquet_need_no_folder(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cell = {"bytes": (folder / "b.png").read_bytes(), "path": None}
    table = pa.table({"picture": [cell, cell], "text": ["one", "two"]})
    pq.write_table(table, folder / "x.parquet")
    reader = Captions(folder / "x.parquet", image="picture", caption="text")
    assert reader[1].images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert reader.clusters == ["x/0", "x/0"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "a.png", "text": "x"}, "line 2 .* has no 'image' and 'caption' but image, text"),
        ({"image": "a.png", "caption": " "}, "line 2 .*'caption' is empty"),
        ({"image": "c.png", "caption": "x"}, "pair 1 .*c.png"),
        ({"image": "../../etc/passwd", "caption": "x"}, "pair 1 .*"),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    path = folder / "bad.jsonl"
    good = json.dumps({"image": "a.png", "caption": "x"})
    path.write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=message):
        Captions(path)


def test_a_folder_of_classes(tmp_path):
    for name, color in (("red_thing", "red"), ("sky", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / name / "1.jpg")
    reader = ImageFolder(tmp_path)
    assert [(s.target, s.text) for s in reader] == [
        ("red thing", "a photo of a red thing."),
        ("sky", "a photo of a sky."),
    ]
    assert reader[0].candidates == ["red thing", "sky"]
    with pytest.raises(DataError, match="0 class folders"):
        ImageFolder(tmp_path / "sky")


# --- shards -------------------------------------------------------------------------------------


def shards(folder: Path, sizes: tuple[int, ...]) -> str:
    number = 0
    for i, size in enumerate(sizes):
        with tarfile.open(folder / f"s{i:03d}.tar", "w") as tar:
            for _ in range(size):
                buffer = io.BytesIO()
                Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
                words = {"caption": f"n{number}"}
                parts = {"png": buffer.getvalue(), "json": json.dumps(words).encode()}
                if number % 2:
                    parts = {"png": buffer.getvalue(), "txt": f"n{number}".encode()}
                for kind, data in parts.items():
                    member = tarfile.TarInfo(f"{number:05d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return str(folder / "s*.tar")


class Names:
    """A processor whose batches hold the captions alone."""

    max_length = 0

    def collate(self, samples):
        ids = torch.zeros(len(samples), 1, dtype=torch.long)
        return Batch(None, None, {"text": Tokens(ids, ids, ids + 1)}, list(samples))


class Counts:
    def counts(self, batch):
        return {"pairs": len(batch.samples)}


class Loop:
    """The part of a trainer that says how many batches were used."""

    def __init__(self, used: int) -> None:
        self.max_steps = 100
        self.current, self.ready = self, used
        self.fit_loop = self.epoch_loop = self.batch_progress = self


def captions(module: StreamModule, count: int) -> list[list[str]]:
    found = []
    for batch, _ in zip(module.train_dataloader(), range(count), strict=False):
        found.append([sample.text for sample in batch.samples])
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continues_where_it_stopped(tmp_path, workers):
    options = {"batch_size": 3, "buffer": 5, "workers": workers, "seed": 3}
    pattern = shards(tmp_path, (7, 4, 6, 5))

    def module():
        return StreamModule(pattern, Names(), Counts(), **options)

    whole = captions(module(), 16)
    if workers == 0:  # several read shards of unequal sizes, so that one starts over before
        assert len(set(sum(whole, [])[:22])) == 22 and len(set(sum(whole, [])[22:44])) == 22
    for used in (1, 4, 11):
        begun = module()
        begun.trainer = Loop(used)
        for _ in zip(begun.train_dataloader(), range(used + 1), strict=False):
            pass
        state = json.loads(json.dumps(begun.state_dict()))
        resumed = module()
        resumed.load_state_dict(state)
        assert captions(resumed, 16 - used) == whole[used:]


def test_ranks_share_no_sample_of_a_pass(tmp_path, monkeypatch):
    from triptych.data import stream

    pattern, seen = shards(tmp_path, (6, 6, 6, 6)), []
    for rank in (0, 1):
        monkeypatch.setattr(stream, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(stream, "world", lambda: 2)
        module = StreamModule(pattern, Names(), Counts(), batch_size=4, buffer=6)
        seen.append(sum(captions(module, 3), []))
    assert not set(seen[0]) & set(seen[1]) and len(set(seen[0] + seen[1])) == 24


def test_what_is_wrong_with_shards_is_said(tmp_path):
    with pytest.raises(DataError, match="no shard matches"):
        find_shards(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match="s001.tar' does not exist"):
        shards(tmp_path, (1,))
        find_shards(str(tmp_path / "s{000..001}.tar"))
    (tmp_path / "broken.tar").write_bytes((tmp_path / "s000.tar").read_bytes()[:700])
    with pytest.raises(DataError, match="broken.tar' is no whole tar file"):
        list(read_shards([str(tmp_path / "broken.tar")]))
    module = StreamModule(str(tmp_path / "s000.tar"), Names(), Counts())
    assert [[s.text for s in row] for row in module.first_rows(9)] == [["n0"]]
    module.trainer = Loop(0)
    module.trainer.max_steps = -1
    with pytest.raises(TriptychError, match="trainer.max_steps"):
        module.setup("fit")

"""Image search: equal to brute force, follows the folder, and bad files do no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import triptych.api
from triptych.apps import search, search_index
from triptych.apps.search_index import Index, update
from triptych.data.images import open_image
from triptych.data.processor import ImageLoader
from triptych.data.shapes import Shapes
from triptych.data.transforms import ImageTransform
from triptych.types import TriptychError


class Eyes:
    """A predictor that embeds a picture as its mean colour, and counts what it saw."""

    batch_size = 4
    capabilities = frozenset({"embed"})

    def __init__(self, weight: float = 1.0) -> None:
        self.model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.model.weight, weight)
        torch.nn.init.constant_(self.model.bias, 0.0)
        self.processor = type("P", (), {"images": ImageLoader(ImageTransform(size=(8, 8)))})()
        self.seen: list[str] = []

    def embed_images(self, refs):
        self.seen += [Path(ref.name).name for ref in refs]
        transform = self.processor.images.transform
        means = [transform(ref.open()).float().mean((1, 2)) - 100 for ref in refs]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)[:, None]

    def embed_texts(self, texts):
        value = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
        return torch.tensor([value[t] for t in texts], dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 noisy pictures in two folders, a truncated PNG, and a text file named .jpg."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    root = tmp_path / "pictures"
    for i in range(60):
        color = rng.integers(0, 256, 3)
        noise = np.clip(color + rng.integers(-9, 9, (12, 12, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noise).save(root / ("deep" if i % 2 else ".") / f"{i:02d}.png")
    whole = (root / "00.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.jpg").write_text("no picture at all")
    (root / "notes.txt").write_text("not called like one")
    return root


@pytest.fixture(autouse=True)
def eyes(monkeypatch):
    monkeypatch.setattr(search_index, "BLOCK", 16)
    made: list[Eyes] = []

    def predictor(run: str, batch: int) -> Eyes:
        made.append(Eyes())
        return made[-1]

    monkeypatch.setattr(search, "predictor", predictor)
    return made


def brute_force(root: Path, query: torch.Tensor) -> list[tuple[str, float]]:
    model, rows = Eyes(), []
    for path in sorted(root.rglob("*.png")):
        if path.name != "cut.png":
            ref = type("R", (), {"open": lambda self, p=path: open_image(p), "name": str(path)})()
            rows.append((float(model.embed_images([ref])[0, 0] @ query), str(path.resolve())))
    return [(path, cosine) for cosine, path in sorted(rows, key=lambda r: (-r[0], r[1]))]


def test_from_the_command_line(folder, tmp_path, capsys, eyes):
    place, sheet = str(tmp_path / "index"), tmp_path / "sheet.png"
    assert search.main(["index", str(folder), "--run", "clip", "--index", place]) == 0
    out = capsys.readouterr().out
    assert "60 images" in out and "60 embedded" in out and "2 skipped" in out
    assert "skipped cut.png" in out and "skipped text.jpg" in out
    command = ["query", "red", "-k", "7", "--index", place, "--sheet", str(sheet)]
    assert search.main(command) == 0
    lines = capsys.readouterr().out.splitlines()[:7]
    known = brute_force(folder, torch.tensor([1.0, 0, 0]))
    assert [line.split()[2] for line in lines] == [path for path, _ in known[:7]]
    assert float(lines[0].split()[1]) == pytest.approx(known[0][1], abs=1e-4)
    assert Image.open(sheet).size[0] > 800
    image = str(folder / "deep" / "07.png")
    command = ["query", "--image", image, "-k", "1", "--index", place, "--sheet", str(sheet)]
    assert search.main(command) == 0
    assert "07.png" in capsys.readouterr().out
    assert search.main(["index", str(folder), "--index", place]) == 0
    assert "0 embedded, 60 kept" in capsys.readouterr().out and eyes[-1].seen == []


def test_added_changed_and_deleted_files(folder, tmp_path):
    place = tmp_path / "index"
    update(folder, place, "clip", Eyes())
    (folder / "00.png").unlink()
    Image.new("RGB", (12, 12), "blue").save(folder / "02.png")
    os.utime(folder / "02.png", (1, 1))
    Image.new("RGB", (12, 12), (0, 0, 250)).save(folder / "new.png")
    model = Eyes()
    report = update(folder, place, "clip", model)
    assert sorted(model.seen) == ["02.png", "new.png"]
    assert (report.total, report.embedded, report.kept, report.removed) == (60, 2, 58, 1)
    for query in np.eye(3, dtype=np.float32):
        found = Index.open(place).nearest(query[None], 60)
        known = brute_force(folder, torch.from_numpy(query))
        assert [p for p, _ in found] == [p for p, _ in known]
        np.testing.assert_allclose([c for _, c in found], [c for _, c in known], atol=1e-6)
    assert [p.name for p in place.glob("generation-*")] == ["generation-2"]


def test_an_interrupted_update_goes_on(folder, tmp_path):
    place = tmp_path / "index"

    class Tired(Eyes):
        def embed_images(self, refs):
            if len(self.seen) > 20:
                raise KeyboardInterrupt
            return super().embed_images(refs)

    tired = Tired()
    with pytest.raises(KeyboardInterrupt):
        update(folder, place, "clip", tired)
    with pytest.raises(TriptychError, match="no index"):
        Index.open(place)
    rest = Eyes()
    report = update(folder, place, "clip", rest)
    assert not set(tired.seen) & set(rest.seen) and len(tired.seen) + len(rest.seen) == 60
    assert report.total == 60 and not (place / "pending").exists()
    found = Index.open(place).nearest(np.eye(3, dtype=np.float32)[:1], 60)
    assert [p for p, _ in found] == [p for p, _ in brute_force(folder, torch.eye(3)[0])]


def test_vectors_of_two_models_are_never_mixed(folder, tmp_path, capsys):
    place = tmp_path / "index"
    update(folder, place, "clip", Eyes())
    with pytest.raises(TriptychError, match="has changed.*--rebuild"):
        update(folder, place, "clip", Eyes(weight=2.0))
    other = Eyes(weight=2.0)
    assert update(folder, place, "clip", other, rebuild=True).embedded == 60
    assert search.main(["query", "red", "--index", str(place)]) == 1
    assert "has changed" in capsys.readouterr().err
    assert search.main(["index", str(folder), "--run", "siglip", "--index", str(place)]) == 1
    assert "two models" in capsys.readouterr().err


def test_blocks_of_the_comparison_change_nothing(folder, tmp_path, monkeypatch):
    update(folder, tmp_path / "index", "clip", Eyes())
    known = Index.open(tmp_path / "index")
    whole = known.nearest(np.eye(3, dtype=np.float32)[1:2], 9)
    monkeypatch.setattr(search_index, "ROWS", 7)
    assert known.nearest(np.eye(3, dtype=np.float32)[1:2], 9) == whole
    assert isinstance(known.vectors, np.memmap)


def test_faiss_finds_the_same(folder, tmp_path):
    pytest.importorskip("faiss")
    update(folder, tmp_path / "index", "clip", Eyes())
    known = Index.open(tmp_path / "index")
    exact = known.nearest(np.eye(3, dtype=np.float32)[:1], 5)
    assert known.build_faiss() == "IVF1,Flat"
    found = known.nearest(np.eye(3, dtype=np.float32)[:1], 5)
    assert [p for p, _ in found] == [p for p, _ in exact]
    np.testing.assert_allclose([c for _, c in found], [c for _, c in exact], atol=1e-6)


def fake_index(place: Path, vectors: int, width: int = 16, topics: int = 40) -> Index:
    """An index as `update` writes it, of random unit vectors around some topics."""
    rng = np.random.default_rng(0)
    side = place / "generation-1"
    side.mkdir(parents=True)
    centres = rng.normal(size=(topics, width)).astype(np.float32)
    shape = (vectors, width)
    rows = np.lib.format.open_memmap(side / "vectors.npy", "w+", np.float32, shape)
    for start in range(0, vectors, 50_000):
        part = rows[start : start + 50_000]
        noise = rng.normal(size=part.shape).astype(np.float32)
        part[:] = centres[rng.integers(0, topics, len(part))] + 0.3 * noise
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    rows.flush()
    names = pa.array([f"{i:07d}.png" for i in range(vectors)])
    table = pa.table({"name": names, "size": range(vectors), "mtime": range(vectors)})
    pq.write_table(table, side / "files.parquet")
    facts = {"run": "clip", "model": "m", "folder": str(place), "generation": side.name}
    (place / "index.json").write_text(json.dumps(facts))
    return Index.open(place)


def test_faiss_over_many_lists_finds_what_brute_force_finds(tmp_path):
    pytest.importorskip("faiss")
    known = fake_index(tmp_path, 6000)
    queries = np.asarray(known.vectors[::600])
    exact = [known.nearest(q[None], 5) for q in queries]
    kind = known.build_faiss()
    assert kind.startswith("IVF1") and len(kind) > len("IVF1,Flat")
    assert [[p for p, _ in known.nearest(q[None], 5)] for q in queries] == [
        [p for p, _ in found] for found in exact
    ]


def test_answers_come_from_the_pictures_that_were_found(folder, tmp_path, capsys, monkeypatch):
    load, model = triptych.api.load, triptych.load("llava")  # its connector is random, so load once
    monkeypatch.setattr(triptych.api, "load", lambda run: model if run == "llava" else load(run))
    place = str(tmp_path / "index")
    assert search.main(["index", str(folder), "--run", "clip", "--index", place]) == 0
    capsys.readouterr()
    ask = ["answer", "red", "--index", place, "-k", "2", "--with"]
    assert search.main([*ask, "llava"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    known = brute_force(folder, torch.tensor([1.0, 0, 0]))[:2]
    assert [line[2] for line in lines] == [path for path, _ in known]
    assert [line[0] for line in lines] == model.answer([path for path, _ in known], "red")
    assert search.main([*ask, "clip"]) == 1
    assert "writes no answers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_million_vectors_are_searched_from_disk(tmp_path):
    """Anonymous memory stays far below the 256 MB of the vectors."""
    fake_index(tmp_path, 1_000_000, width=64)
    code = (
        "import sys, numpy as np, pathlib\n"
        "from triptych.apps.search_index import Index\n"
        "def anonymous():\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(text.partition('RssAnon:')[2].split()[0]) / 1024\n"
        "import pyarrow.parquet\n"
        "before = anonymous()\n"
        "index = Index.open(pathlib.Path(sys.argv[1]))\n"
        "query = np.array(index.vectors[777_777:777_778])\n"
        "found = index.nearest(query, 3)\n"
        "print(found[0][0], found[0][1], anonymous() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[0].endswith("0777777.png") and float(said[1]) == pytest.approx(1, abs=1e-5)
    assert float(said[2]) < 150


@pytest.mark.slow
def test_two_thousand_pictures_from_the_command_line(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    scenes = Shapes("test", size=2000, kind="retrieval")
    for i in range(2000):
        scenes.image(i).open().save(root / f"{i:04d}.png")
    (root / "cut.png").write_bytes((root / "0000.png").read_bytes()[:100])
    (root / "text.jpg").write_text("no picture")
    app = [sys.executable, "-m", "triptych.apps.search"]
    run = str(tmp_path / "run")
    train = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "model=clip"]
    train += ["trainer.max_steps=2", "benchmark=none", f"hydra.run.dir={run}"]
    subprocess.run(train, check=True, cwd=tmp_path)
    place = str(tmp_path / "index")

    def call(*arguments: str) -> str:
        done = subprocess.run([*app, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = call("index", str(root), "--run", run, "--index", place)
    assert "2,000 images" in said and "2 skipped" in said
    found = call("query", "a red circle", "-k", "10", "--index", place).splitlines()[:10]
    model = triptych.load(run)
    vectors = model.embed(images=[str(root / f"{i:04d}.png") for i in range(2000)])
    cosines = (vectors.flatten(1) @ model.embed(texts=["a red circle"])[0].flatten()).tolist()
    best = sorted(range(2000), key=lambda i: -cosines[i])[:10]
    assert [Path(line.split()[2]).stem for line in found] == [f"{i:04d}" for i in best]
    (root / "0001.png").unlink()
    assert "0 embedded, 1,999 kept, 1 removed" in call("index", str(root), "--index", place)

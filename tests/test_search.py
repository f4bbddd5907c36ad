"""Image search: equal to brute force, follows the folder, and bad files do no harm."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.apps import search, search_index
from triptych.apps.search_index import Index, update
from triptych.data.images import open_image
from triptych.data.processor import ImageLoader
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

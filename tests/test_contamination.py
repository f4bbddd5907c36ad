"""Near-duplicates of training images: which are found, which are not, and the clean score."""

from __future__ import annotations

import io

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_evaluation import Eyes, bench

from triptych.data.shapes import Shapes
from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.contamination import Manifest, watch, watch_all
from triptych.evaluation.runner import evaluate
from triptych.types import DataError, ImageRef


def photo(seed: int, side: int = 96) -> Image.Image:
    """Smooth random colours, as varied as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def refs(*pictures: Image.Image) -> list[ImageRef]:
    return [ImageRef.from_picture(p, f"p{i}") for i, p in enumerate(pictures)]


def test_copies_are_found_compressed_and_resized():
    train = Manifest.of(refs(*(photo(i) for i in range(20))))
    one = photo(7)
    copies = {
        "same": one,
        "compressed": jpeg(one, 40),
        "resized": one.resize((64, 64)),
        "larger": one.resize((200, 200)),
    }
    for name, picture in copies.items():
        (ref,) = refs(picture)
        assert train.duplicates([ref]) == {ref.key: "p7"}, name
    for name, picture in {
        "another": photo(99),
        "mirrored": one.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "darker": one.point(lambda v: int(v * 0.7)),
    }.items():
        assert train.duplicates(refs(picture)) == {}, name


def test_scenes_of_two_splits_are_no_duplicates():
    train = Manifest.of(Shapes("train", 150).image(i) for i in range(150))
    test = [Shapes("test", 60).image(i) for i in range(60)]
    assert train.duplicates(test) == {}
    assert len(train.duplicates([Shapes("train", 150).image(3)])) == 1


def test_broken_and_repeated_training_images(tmp_path):
    def broken():
        raise DataError("no picture")

    good = refs(photo(1))[0]
    manifest = Manifest.of([good, good, ImageRef("x", broken, "broken.png")])
    assert manifest.keys.tolist() == [good.key]
    manifest.save(tmp_path / "m.npz")
    again = Manifest.load(tmp_path / "m.npz")
    assert again.duplicates([good]) == {good.key: "p0"}
    empty = Manifest.of([])
    assert empty.duplicates([good]) == {}


def test_the_clean_part_is_scored_too(tmp_path):
    import pyarrow.parquet as pq

    benchmark = bench(12)
    known = benchmark.samples[0].images[0]
    watched = watch(benchmark, Manifest.of([known]))
    assert isinstance(watched, AnswerBenchmark) and not hasattr(benchmark, "flags")
    model = Eyes()
    model.see = lambda s: "red" if s.cluster == "0" else "yes"  # right on the copy alone
    metrics = evaluate(model, {"toy": watched}, tmp_path, blind="none", progress=False)["metrics"]
    whole, clean = metrics["toy/accuracy"], metrics["toy/accuracy/clean"]
    assert (whole["n"], clean["n"]) == (36, 24), "all red pictures are as good as equal"
    assert whole["contaminated"] == pytest.approx(12 / 36, abs=1e-6)
    assert "8x8" in whole["contamination_rule"]
    others = [s for s in benchmark.samples if int(s.cluster) % 3]
    alone = AnswerBenchmark(others, slice_by="type")
    expected = evaluate(model, {"toy": alone}, None, blind="none", progress=False)["metrics"]
    assert clean["value"] == expected["toy/accuracy"]["value"] != whole["value"]
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    flagged = {row["sample_id"] for row in rows if row["contaminated"] == "p0.png"}
    assert flagged == {row["sample_id"] for row in rows} - {sample.id for sample in others}


def test_a_run_is_read_once_and_presets_are_not_checked(tmp_path, capsys):
    node = {"_target_": "triptych.data.shapes.Shapes", "split": "test", "size": 5}
    cfg = OmegaConf.create({"data": {"train": node}})
    benchmark = AnswerBenchmark(Shapes("test", 5), slice_by="type")
    watched = watch_all({"shapes": benchmark}, cfg, tmp_path)["shapes"]
    assert len(watched.flags) == 5 and "5 of 5 samples repeat" in capsys.readouterr().out
    (stored,) = tmp_path.glob("*.npz")
    before = stored.stat().st_mtime_ns
    watch_all({"shapes": benchmark}, cfg, tmp_path)
    assert stored.stat().st_mtime_ns == before
    assert watch_all({"shapes": benchmark}, None, None)["shapes"] is benchmark
    assert "not checked" in capsys.readouterr().out

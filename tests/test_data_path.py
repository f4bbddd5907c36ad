"""The data path: draft decoding, pictures kept as uint8, remembered tokens, room of the caches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data import cache_room
from triptych.data.images import open_image
from triptych.data.pixels import PixelCache
from triptych.data.processor import ImageLoader
from triptych.data.transforms import ImageTransform
from triptych.types import ImageRef, TriptychError


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG of 512 x 384: smooth colours, an edge and some grain."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC)).astype(float)
    pixels[100:250, 150:350] += 50
    pixels += random.normal(0, 6, pixels.shape)
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_a_draft_differs_little_from_the_exact_picture(photo, fit):
    ref = ImageRef.from_file(photo)
    exact = ImageTransform((96, 96), fit, decode="exact").read(ref)
    draft = ImageTransform((96, 96), fit).read(ref)
    assert exact.shape == draft.shape == (3, 96, 96) and draft.dtype == torch.uint8
    gap = (exact.float() - draft.float()).abs()
    assert 0 < gap.mean() < 2


def test_the_exact_path_is_pillows_own(photo):
    transform = ImageTransform((96, 96), decode="exact")
    assert torch.equal(transform.read(ImageRef.from_file(photo)), transform(open_image(photo)))


def test_a_draft_keeps_the_pixels_that_are_needed(photo):
    assert open_image(photo, draft=96).size == (128, 96)
    assert open_image(photo, draft=97).size == (256, 192)
    assert open_image(photo, draft=384).size == (512, 384)


def test_a_draft_stands_upright(photo, tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as picture:
        picture.save(turned, exif=exif)
    assert open_image(turned).size == (384, 512)
    assert open_image(turned, draft=96).size == (96, 128)


def test_a_picture_of_the_right_size_is_left_alone(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = ImageTransform((32, 32)).read(ImageRef.from_file(tmp_path / "a.png"))
    assert torch.equal(read, torch.from_numpy(pixels).permute(2, 0, 1))


def test_an_unknown_way_to_decode_is_refused():
    with pytest.raises(TriptychError, match="draft or exact"):
        ImageTransform(decode="fast")


def test_kept_pixels_are_those_of_the_transform(tmp_path, pictures, dialogue):
    transform = ImageTransform((24, 24))
    cache = PixelCache(tmp_path, transform)
    assert cache.fill(pictures[:3], limit_gb=1, progress=False)
    assert pictures[2].key in PixelCache(tmp_path, transform)
    assert pictures[2].key not in PixelCache(tmp_path, ImageTransform((16, 16)))
    samples = [dialogue(("a", "b"), images=(i,)) for i in (2, 0, 3, 1)]
    plain, kept = ImageLoader(transform), ImageLoader(transform)
    kept.pixels = cache  # the fourth picture is not in it
    assert torch.equal(kept(samples)[0].pixels, plain(samples)[0].pixels)
    assert cache.fill(pictures[:4], limit_gb=1, progress=False)  # now it is, in a file of its own
    assert torch.equal(cache([s.images[0].key for s in samples]), plain(samples)[0].pixels)
    assert torch.equal(kept(samples)[0].pixels, plain(samples)[0].pixels)


def test_pictures_beyond_the_limit_are_not_kept(tmp_path, pictures):
    cache = PixelCache(tmp_path, ImageTransform((24, 24)))
    assert not cache.fill(pictures, limit_gb=2 * cache.item_bytes / 2**30, progress=False)
    assert not cache.folder.exists()


def test_tokens_are_remembered_by_template_and_limit(vlm, dialogue):
    processor, sample = vlm.processor(), dialogue(("what color?", "red"))
    first = processor.encode(sample)
    assert processor.encode(sample) is first
    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.tokenizer.chat_template = processor.tokenizer.chat_template.replace("<|end|>", "")
    assert processor.encode(sample).ids != first.ids


def test_caches_are_listed_and_the_oldest_go_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    for day, (kind, name) in enumerate((("features", "old"), ("pixels", "new"))):
        folder = tmp_path / kind / name
        folder.mkdir(parents=True)
        (folder / "x.npy").write_bytes(bytes(2**20))
        cache_room.os.utime(folder, (1e9 + day, 1e9 + day))
    assert [s.path.name for s in cache_room.cache_sets(tmp_path)] == ["old", "new"]
    assert cache_room.keep(tmp_path, 1.5 / 1024) == 2**20
    assert [s.path.name for s in cache_room.cache_sets(tmp_path)] == ["new"]
    assert cache_room.main([]) == 0 and "1.0 MiB in" in capsys.readouterr().out
    assert cache_room.main(["empty"]) == 0 and not cache_room.cache_sets(tmp_path)
    with pytest.raises(TriptychError, match="empty"):
        cache_room.main(["everything"])

"""The data path: JPEGs to tensors and small PNGs to tensors, against Pillow and the slow processor.

python benchmarks/data.py [--quick]

JPEGs are 1024 x 768, drawn here from a seed with noise like a photograph's (about 300 kB); PNGs are
easy-VQA's. All run with one thread, in one process. The check states the difference in pixels.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import side_by_side
from side_by_side import Memory, Result, finished

JPEG = ("pillow+slow_processor", "pillow+fast_processor", "ours_exact", "ours")
PNG = ("png_pillow+slow_processor", "png_decode", "png_ours_cached")
COUNT = {"jpeg": 64, "png": 1000}


def jpegs(count: int) -> list[Path]:
    """Pictures with smooth colours, edges and grain."""
    import numpy as np
    from PIL import Image

    folder = Path(tempfile.gettempdir()) / "triptych-benchmark-jpegs-1"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((1024, 768), Image.Resampling.BICUBIC)).astype(float)
        pixels[200:500, 300:700] += 60 * random.choice([-1, 1])
        pixels += random.normal(0, 9, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def pngs(count: int) -> list[Path]:
    from easy_vqa import get_train_image_paths

    return [Path(p) for p in list(get_train_image_paths().values())[:count]]


def references(paths: list[Path]):
    from triptych.types import ImageRef

    return [ImageRef.from_file(p) for p in paths]


def transform(size: int, decode: str = "draft"):
    from triptych.data.transforms import ImageTransform

    return ImageTransform(size=(size, size), fit="crop", decode=decode)


def library(size: int, slow: bool):
    from transformers import CLIPImageProcessor

    if slow:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        made = CLIPImageProcessorPil
    else:
        made = CLIPImageProcessor
    return made(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def theirs(paths: list[Path], size: int, slow: bool):
    from PIL import Image

    processor = library(size, slow)
    return [
        processor(Image.open(p).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        for p in paths
    ]


def own(refs: list, how) -> object:
    """Decoded one by one, normalised as a batch, as a step does it."""
    import torch

    pieces = [
        how.normalize(torch.stack([how.read(r) for r in refs[i : i + 16]]))
        for i in range(0, len(refs), 16)
    ]
    return torch.cat(pieces)


def check(args) -> Result:
    """Difference to the slow processor in levels of 255, over the pictures of the run."""
    import torch

    paths = jpegs(16)
    reference = torch.stack(theirs(paths, 224, slow=True))
    report: Result = {"jpeg_kib": round(sum(p.stat().st_size for p in paths) / 1024 / 16)}
    for decode in ("exact", "draft"):
        how = transform(224, decode)
        scale = torch.tensor(how.std)[:, None, None] * 255
        gap = ((own(references(paths), how) - reference) * scale).abs()
        report[f"{decode} mean difference /255"] = round(float(gap.mean()), 3)
        report[f"{decode} largest difference /255"] = round(float(gap.max()), 1)
    return report


def measure(variant: str, args) -> Result:
    import torch

    torch.set_num_threads(1)
    png = variant.startswith("png")
    paths = pngs(args.pngs) if png else jpegs(args.jpegs)
    size, repeats = (64, 4) if png else (224, 1)
    if variant.endswith("processor"):
        slow = "slow" in variant
        run = lambda: theirs(paths, size, slow)  # noqa: E731
    elif variant == "png_ours_cached":
        from triptych.data.pixels import PixelCache

        how, refs = transform(64), references(paths)
        cache = PixelCache(tempfile.mkdtemp(), how)
        cache.fill(refs, 8, progress=False)
        repeats *= 10

        def run():
            for i in range(0, len(refs), 64):
                how.normalize(cache([r.key for r in refs[i : i + 64]]))
    else:
        how = transform(size, "exact" if variant == "ours_exact" else "draft")
        refs = references(paths)
        run = lambda: own(refs, how)  # noqa: E731
    own(references(paths[:2]), transform(size))  # imports, and the first use of every kernel
    with Memory() as memory:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = time.perf_counter() - start
    return finished(repeats * len(paths), seconds, added_mib=memory.added_mib, unit="images/s")


def main() -> None:
    parse = side_by_side.parser(__doc__)
    args = parse.parse_args()
    args.jpegs, args.pngs = (8, 100) if args.quick else (COUNT["jpeg"], COUNT["png"])
    if args.one is None or not args.one.startswith("png"):
        side_by_side.main("data", args, JPEG, check, measure, "pillow+slow_processor")
    if args.one is None or args.one.startswith("png"):
        side_by_side.main("data_png", args, PNG, None, measure, "png_decode")


if __name__ == "__main__":
    main()

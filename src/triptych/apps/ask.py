"""Ask a model about images, on the command line.

    python -m triptych.apps.ask --model hf --id ID_OR_FOLDER photo.jpg "What is it?"

Works with a run, a preset or any image-text-to-text model, trained here or not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from triptych.errors import DataError, TriptychError

if TYPE_CHECKING:
    from triptych.api import Loaded

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass
class Answer:
    """One row of the output; of `answer` and `error` one is null."""

    image: str | None
    prompt: str
    answer: str | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every image was answered, 1 if some were skipped, 2 if nothing could run."""
    args = parser().parse_args(argv)
    try:
        paths = images_of(args.image)
        loaded = open_model(args)
        skipped = write(loaded, paths, args)
    except TriptychError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 1 if skipped else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m triptych.apps.ask", description="Ask a model about an image or a folder."
    )
    made.add_argument("image", help="an image, a folder of images, or - for a question without one")
    made.add_argument("prompts", nargs="+", metavar="prompt", help="one or several questions")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="a run's directory")
    source.add_argument("--model", help="a preset such as llava, or hf together with --id")
    made.add_argument("--id", help="a hub id or folder, for --model hf")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of the preset, as on the command line of train.py",
    )
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--dtype", help="float32, bfloat16, float16, or auto (for --model hf)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps")
    made.add_argument("--device-map", choices=["auto"], help="spread over devices (--model hf)")
    made.add_argument("--format", choices=["table", "jsonl"], default="table")
    made.add_argument("--out", type=Path, help="write there instead of to the terminal")
    return made


def open_model(args: argparse.Namespace) -> Loaded:
    """The model the options name; options that do not fit together are refused."""
    from triptych.api import load

    if (args.id is None) == (args.model == "hf"):
        raise TriptychError("--model hf and --id ID_OR_FOLDER go together; give both or neither.")
    if args.device and args.device_map:
        raise TriptychError("--device and --device-map exclude each other; give one.")
    if args.max_new_tokens < 1 or args.batch_size < 1:
        raise TriptychError("--max-new-tokens and --batch-size start at 1.")
    options = list(args.set)
    if args.model != "hf" and (args.dtype or args.device_map):
        raise TriptychError(
            "--dtype and --device-map belong to --model hf; give a preset's with "
            "--set model.language.dtype=bfloat16, and a run keeps its own."
        )
    options += [f"model.dtype={args.dtype}"] if args.dtype else []
    options += [f"model.device_map={args.device_map}"] if args.device_map else []
    name = args.run or (f"hf:{args.id}" if args.id is not None else args.model)
    return load(name, options, device=args.device)


def images_of(source: str) -> list[Path | None]:
    """The image of this path, or the images directly and further down in this folder."""
    path = Path(source)
    if source == "-":
        return [None]
    if not path.exists():
        raise DataError(f"'{source}' does not exist; name an image, a folder, or - for none.")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"the folder '{source}' holds no image ({', '.join(sorted(SUFFIXES))}).")
    return list(found)


def write(loaded: Loaded, paths: Sequence[Path | None], args: argparse.Namespace) -> int:
    """Write the answers as they come; returns how many images were skipped."""
    from tqdm import tqdm

    failed: set[str] = set()
    target = open(args.out, "w", encoding="utf-8") if args.out else nullcontext(sys.stdout)  # noqa: SIM115
    bar = tqdm(total=len(paths), unit="image", disable=len(paths) == 1, file=sys.stderr)
    with target as file, bar:
        for answers, done in answered(loaded, paths, args.prompts, args):
            bar.clear()
            for row in answers:
                print_row(row, args.format, file)
                if row.error is not None:
                    failed.add(str(row.image))
            bar.update(done)
    skipped = len(failed)
    if skipped:
        print(
            f"{skipped} of {len(paths)} images could not be read and were skipped.", file=sys.stderr
        )
    return skipped


def answered(
    loaded: Loaded, paths: Sequence[Path | None], prompts: Sequence[str], args: Any
) -> Iterator[tuple[list[Answer], int]]:
    """Answers to every prompt of every image, a batch at a time, and how many images those were."""
    from triptych.types import ImageRef, Sample, user

    step = max(1, args.batch_size // len(prompts))  # images whose questions fill a batch
    for start in range(0, len(paths), step):
        here = paths[start : start + step]
        rows: list[Answer] = []
        samples: dict[int, Sample] = {}  # row -> its question
        for path in here:
            refs, error = [], None
            if path is not None:
                try:
                    refs = [ImageRef.from_picture(ImageRef.from_file(path).open(), str(path))]
                except (DataError, OSError) as fault:
                    error = str(fault)
            for prompt in prompts:
                row = Answer(None if path is None else str(path), prompt, error=error)
                if error is None:
                    samples[len(rows)] = Sample(
                        [user(prompt, images=len(refs))], refs, id=f"{path} {len(rows)}"
                    )
                rows.append(row)
        texts = loaded.ask(
            list(samples.values()), args.batch_size, max_new_tokens=args.max_new_tokens
        )
        for row, text in zip(samples, texts, strict=True):
            rows[row].answer = text
        yield rows, len(here)


def print_row(row: Answer, form: str, file: TextIO) -> None:
    """One line of JSON, or the row of a table as wide as the terminal."""
    if form == "jsonl":
        print(json.dumps(asdict(row), ensure_ascii=False), file=file, flush=True)
        return
    width = max(60, shutil.get_terminal_size().columns)
    columns = (width // 4, width // 4, width - 2 * (width // 4) - 4)
    said = row.answer if row.error is None else f"SKIPPED: {row.error}"
    cells = [row.image or "-", row.prompt, said or ""]
    wrapped = [textwrap.wrap(c, w) or [""] for c, w in zip(cells, columns, strict=True)]
    for i in range(max(map(len, wrapped))):
        line = [
            (w[i] if i < len(w) else "").ljust(c) for w, c in zip(wrapped, columns, strict=True)
        ]
        print("  ".join(line).rstrip(), file=file, flush=True)


if __name__ == "__main__":
    sys.exit(main())

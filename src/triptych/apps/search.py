"""Image search: `python -m triptych.apps.search index DIR --run RUN`, then `query` or `answer`.

index   embeds a folder; a second call embeds only new and changed files, an interrupted one goes on
query   the images nearest to a text or to another image, with their cosines, and a contact sheet
answer  retrieves images for a question and lets a generative run answer from each of them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.types import DataError, ImageRef, TriptychError

if TYPE_CHECKING:
    from triptych.evaluation.model_predictor import ModelPredictor

SHEET = "contact_sheet.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user's is one sentence and exit code 1."""
    args = _parser().parse_args(argv)
    try:
        args.run_command(args)
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def index(args: argparse.Namespace) -> None:
    """Bring the index of a folder up to date."""
    from triptych.apps.search_index import Index, update

    folder = Path(args.folder)
    place = Path(args.index) if args.index else folder / ".triptych-index"
    known = Index.open(place) if (place / "index.json").is_file() else None
    run = args.run or (known.facts["run"] if known else None)
    if run is None:
        raise TriptychError("name the model that embeds: --run RUN_DIRECTORY, or --run clip/b32.")
    if known is not None and run != known.facts["run"] and not args.rebuild:
        raise TriptychError(
            f"the index at '{place}' was made by {known.facts['run']}; vectors of two models do "
            "not compare; add --rebuild, or choose another --index."
        )
    report = update(folder, place, run, predictor(run, args.batch), rebuild=args.rebuild)
    for name, reason in report.skipped:
        print(f"skipped {name}: {reason}")
    print(
        f"{report.total:,} images in {place}: {report.embedded:,} embedded, {report.kept:,} kept, "
        f"{report.removed:,} removed, {len(report.skipped):,} skipped."
    )
    if args.faiss:
        print(f"faiss: {Index.open(place).build_faiss()}")


def query(args: argparse.Namespace) -> None:
    """Print the nearest images and draw them on one sheet."""
    if (args.text is None) == (args.image is None):
        raise TriptychError('give a text, as in query "a cat on a sofa", or --image FILE.')
    found = search(args)
    for place, (path, cosine) in enumerate(found, 1):
        print(f"{place:3d}  {cosine:.4f}  {path}")
    sheet = Path(args.sheet or SHEET)
    title = args.text if args.text is not None else f"like {Path(args.image).name}"
    contact_sheet([(Path(p), f"{c:.3f}  {Path(p).name}") for p, c in found], title).save(sheet)
    print(f"Contact sheet: {sheet}")


def answer(args: argparse.Namespace) -> None:
    """Answer a question from each of the images nearest to it."""
    from triptych.api import load

    found = search(args)
    paths = [path for path, _ in found]
    model = load(args.generator)
    if not hasattr(model.model, "generate"):
        raise TriptychError(
            f"--with {args.generator} writes no answers; name a generative run or preset (llava)."
        )
    said = model.answer(paths, args.text)
    for (path, cosine), words in zip(found, said, strict=True):
        print(f"{words}\t{cosine:.4f}\t{path}")


def search(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The k nearest images of the index with their cosines, best first."""
    from triptych.apps.search_index import Index

    known = Index.open(Path(args.index))
    model = predictor(args.run or known.facts["run"], 32)
    if known.facts["model"] != fingerprint(model):
        raise TriptychError(
            f"the model '{args.run or known.facts['run']}' has changed since the index was made; "
            "index the folder again with --rebuild."
        )
    image = getattr(args, "image", None)
    if image is not None:
        vectors = model.embed_images([ImageRef.from_file(image)])[0]  # (K,E)
    else:
        vectors = model.embed_texts([args.text])  # (1,E)
    return known.nearest(vectors.numpy(), args.k)


def predictor(run: str, batch: int) -> ModelPredictor:
    """A run's or preset's model as something that embeds."""
    from triptych.api import load
    from triptych.evaluation.model_predictor import ModelPredictor

    loaded = load(run)
    made = ModelPredictor(loaded.model, loaded.processor, batch_size=batch)
    if "embed" not in made.capabilities:
        raise TriptychError(
            f"'{run}' does not embed images and texts; name a contrastive run or preset (clip)."
        )
    return made


def fingerprint(model: ModelPredictor) -> str:
    """What the vectors depend on, as one hash."""
    from triptych.adapt import fingerprint as hash_of

    return hash_of(model.model)


def contact_sheet(pictures: Sequence[tuple[Path, str]], title: str) -> Any:
    """The pictures side by side with a line below each; those that are gone stay grey."""
    from PIL import Image, ImageDraw

    from triptych.data.images import open_image

    columns, cell, line = min(5, max(1, len(pictures))), 180, 20
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell + 20, rows * (cell + line) + 50), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 14), title, "#1b1f24")
    for number, (path, words) in enumerate(pictures):
        x, y = 10 + number % columns * cell, 44 + number // columns * (cell + line)
        try:
            picture = open_image(path)
        except DataError:
            picture = Image.new("RGB", (cell, cell), "#d8dee4")
        picture.thumbnail((cell - 10, cell - 10))
        sheet.paste(picture, (x, y))
        draw.text((x, y + cell - 8), words[:28], "#1b1f24")
    return sheet


def _parser() -> argparse.ArgumentParser:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m triptych.apps.search", description=about)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("index", help="embed a folder of images")
    make.add_argument("folder")
    make.add_argument("--run", help="run directory or preset that embeds (kept in the index)")
    make.add_argument("--index", help="where the index lives (default: FOLDER/.triptych-index)")
    make.add_argument("--batch", type=int, default=64)
    make.add_argument("--rebuild", action="store_true", help="embed everything anew")
    make.add_argument("--faiss", action="store_true", help="add a faiss index for large folders")
    make.set_defaults(run_command=index)
    ask = commands.add_parser("query", help="find images by a text or another image")
    ask.add_argument("text", nargs="?")
    ask.add_argument("--image", help="find what looks like this file")
    ask.add_argument("--sheet", help=f"file of the contact sheet (default: {SHEET})")
    ask.set_defaults(run_command=query)
    reply = commands.add_parser("answer", help="answer a question from the images found for it")
    reply.add_argument("text", metavar="question")
    reply.add_argument("--with", dest="generator", required=True, help="generative run or preset")
    reply.set_defaults(run_command=answer)
    for command in (ask, reply):
        command.add_argument("--index", required=True)
        command.add_argument("--run", help="default: the run that made the index")
        command.add_argument("-k", type=int, default=5)
    return parser


if __name__ == "__main__":
    sys.exit(main())

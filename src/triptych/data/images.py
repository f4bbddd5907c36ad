"""Opening pictures that others made: complete, bounded in size, and inside their folder."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from triptych.types import DataError

ORIENTATION = 0x0112  # the EXIF tag of how the camera was held
MAX_PIXELS = 64_000_000  # an 8000 x 8000 picture; below the size at which Pillow itself warns


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS, draft: int | None = None
) -> Image.Image:
    """Decode a whole picture to RGB, upright, or say in a DataError what is wrong with it.

    `source` is a path or the file's bytes. draft: the shorter side's pixels that are enough; a
    JPEG of twice that or more is decoded at a half, a quarter or an eighth of its size. Only the
    first frame of an animation is read. Decoding ends here, never later in a worker: a truncated
    file fails now and by name.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else f"image '{source}'"
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():  # between one and two of Pillow's limits it only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file)
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; check the path and data.images.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(name, max_pixels)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(_unreadable(name, error)) from None
    with picture:
        if picture.width * picture.height > max_pixels:  # known from the header, before decoding
            raise DataError(_too_large(name, max_pixels))
        try:
            if draft and picture.format == "JPEG":
                part = draft / min(picture.size)
                picture.draft("RGB", tuple(math.ceil(side * part) for side in picture.size))
            picture.load()
            if picture.getexif().get(ORIENTATION, 1) == 1 and picture.mode == "RGB":
                return picture.copy()
            return _to_rgb(ImageOps.exif_transpose(picture))
        except Exception as error:
            raise DataError(_unreadable(name, error)) from None


def resolve_inside(path: str | Path, root: str | Path) -> Path:
    """The real path of `path` below `root`; whatever leaves the folder is refused.

    A relative path starts at `root`, an absolute one must lie in it. Links are followed first, so
    neither `..` nor a symbolic link reaches a file outside.
    """
    try:
        folder = Path(root).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise DataError(f"image folder '{root}' does not exist; check data.images.") from None
    try:
        real = (folder / path).resolve(strict=True)
    except FileNotFoundError:
        # Judge the place before saying whether something is there.
        inside = (folder / path).resolve().is_relative_to(folder)
        fault = "does not exist" if inside else "leaves it"
    except (OSError, ValueError, RuntimeError):  # NUL bytes, loops of links, names too long
        fault = "is not a usable path"
    else:
        if real.is_relative_to(folder):
            return real
        fault = "leaves it"
    raise DataError(
        f"image path {str(path)!r} {fault} (image folder '{root}'); correct the path, "
        "or set data.images to the folder that really holds the files."
    )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # 16-bit grey: Pillow clips where scaling is meant
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return picture.convert("RGB")


def _too_large(name: str, max_pixels: int) -> str:
    return (
        f"{name} has more than {max_pixels:,} pixels, the limit against decompression bombs; "
        "scale it down or leave it out."
    )


def _unreadable(name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if "cannot identify" in reason:
        reason = "the content is no picture that Pillow knows, whatever the file is called"
    return f"{name} cannot be read ({reason}); replace the file or drop its sample."

"""Procedural scenes: what is in a picture, drawn from a generator, and how it is painted.

A scene lives in the unit square (x to the right, y downwards) and knows nothing of pixels, so that
the same scene can be painted at any size. Nothing here touches the words about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triptych.types import DataError

if TYPE_CHECKING:
    from numpy.random import Generator
    from PIL.ImageFont import FreeTypeFont

VERSION = 1  # raise it whenever a seed would draw another scene or other words: it is in every key

# Two ends of the range a name covers; a colour is drawn between them, then jittered a little.
COLORS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((255, 0, 0), (225, 25, 35)),
    "green": ((0, 255, 0), (0, 130, 0)),
    "blue": ((0, 0, 255), (40, 80, 225)),
    "black": ((0, 0, 0), (30, 30, 30)),
    "gray": ((128, 128, 128), (150, 150, 155)),
    "teal": ((0, 128, 128), (0, 150, 145)),
    "brown": ((165, 42, 42), (125, 70, 30)),
    "yellow": ((255, 255, 0), (245, 215, 20)),
    "orange": ((255, 140, 0), (245, 150, 40)),
    "purple": ((128, 0, 128), (150, 50, 190)),
    "pink": ((255, 105, 180), (250, 140, 190)),
    "white": ((255, 255, 255), (240, 240, 240)),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond", "ring", "arrow")
WORDS = (
    "ant", "bat", "bee", "box", "bus", "cab", "cat", "cow", "cup", "dog", "egg", "elf", "fan",
    "fig", "fox", "gem", "hat", "hen", "ice", "ink", "jam", "jar", "key", "kid", "leg", "log",
    "map", "mud", "nut", "oak", "owl", "pan", "pen", "pig", "pot", "ram", "rat", "rug", "saw",
    "sea", "sky", "sun", "tea", "toy", "van", "web", "wig", "yak", "zoo",
)  # fmt: skip

SMALL, LARGE = 7.0 / 64, 9.5 / 64  # radii up to / from which an object is called small / large
_MOST = {1: 16.5, 2: 13.5, 3: 11.5, 4: 10.5}  # largest radius, in 64ths, by number of objects
_THIN = 3.5 / 64
_SUPERSAMPLE = 3
_UNIT = {  # outlines in [-1, 1]^2; rectangle and triangle get their own proportions
    "rectangle": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in ((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3))
        + ((-1, 1), (-3, 1), (-3, -1), (-1, -1))
    ),
    "star": tuple(
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k, r in ((k, 0.42 if k % 2 else 1.0) for k in range(10))
    ),
    "arrow": ((1, 0), (0.1, -0.9), (0.1, -0.35), (-1, -0.35), (-1, 0.35), (0.1, 0.35), (0.1, 0.9)),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape: its names and where it is; `points` is its outline, empty if round."""

    shape: str
    color: str
    rgb: tuple[int, int, int]
    center: tuple[float, float]
    radii: tuple[float, float]  # half width, half height
    points: tuple[tuple[float, float], ...]

    @property
    def size(self) -> str:
        """ "small", "large", or "medium" for what no sentence should call either."""
        radius = max(self.radii)
        return "small" if radius <= SMALL else "large" if radius >= LARGE else "medium"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in the unit square."""
        (x, y), (rx, ry) = self.center, self.radii
        return x - rx, y - ry, x + rx, y + ry

    @property
    def tag(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def column(self) -> int:
        return _third(self.center[0])

    @property
    def row(self) -> int:
        return _third(self.center[1])


@dataclass(frozen=True)
class Scene:
    """A picture before it is painted: objects that never touch, at most one word, a background."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    texture: str = "plain"  # plain, noise, stripes or shade
    texture_seed: int = 0
    smooth: bool = True  # anti-aliased edges
    word: str = ""
    word_box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    word_rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def tags(self) -> list[str]:
        """The objects by colour and shape, as a detector would name them; equal ones stay."""
        return [o.tag for o in self.objects]

    @property
    def word_row(self) -> int:
        return _third((self.word_box[1] + self.word_box[3]) / 2)


def sample_scene(rng: Generator, objects: tuple[int, int] = (1, 4), words: float = 0.15) -> Scene:
    """Draw a scene of `objects[0]` to `objects[1]` shapes, fewer being more frequent (4:3:2:1).

    `words` is the probability that a scene of at most two shapes also carries a word.
    """
    low, high = objects
    if not 1 <= low <= high <= 4:
        raise DataError(
            f"objects must be two numbers within 1 and 4, smaller first, not {objects}."
        )
    chances = np.cumsum([5 - n for n in range(low, high + 1)])
    count = low + int(np.searchsorted(chances, rng.integers(int(chances[-1])), side="right"))
    dark = rng.random() < 0.12
    red, green, blue = rng.integers(*((0, 45) if dark else (200, 256)), size=3).tolist()
    kind = rng.random()
    texture = "plain" if kind < 0.85 else ("noise", "stripes", "shade")[int(rng.integers(3))]
    taken: list[tuple[float, float, float, float]] = []
    word = WORDS[int(rng.integers(len(WORDS)))] if count <= 2 and rng.random() < words else ""
    ink = int(rng.integers(200, 256) if dark else rng.integers(0, 60))
    if word:
        width, height = 0.42, 0.21
        x, y = rng.random(2) * (1 - width, 1 - height)
        taken.append((float(x), float(y), float(x) + width, float(y) + height))
    forbidden = "black" if dark else "white"
    names = [name for name in COLORS if name != forbidden]
    shapes = []
    for _ in range(count):
        shape, color = SHAPES[int(rng.integers(len(SHAPES)))], names[int(rng.integers(len(names)))]
        shapes.append(_place(rng, shape, color, taken, 0.8 if word else 1.0, count))
    return Scene(
        objects=tuple(shapes),
        background=(red, green, blue),
        texture=texture,
        texture_seed=int(rng.integers(2**31)),
        smooth=bool(rng.random() < 0.5),
        word=word,
        word_box=taken[0] if word else (0.0, 0.0, 0.0, 0.0),
        word_rgb=(ink, ink, ink),
    )


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Paint a scene as an RGB picture of `image_size` squared."""
    scale = _SUPERSAMPLE if scene.smooth else 1
    side = image_size * scale
    picture = _background(scene, image_size)
    if scale > 1:
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for o in scene.objects:
        if o.shape in ("circle", "ring"):
            box = [v * side for v in o.box]
            pen.ellipse((box[0], box[1], box[2] - 1, box[3] - 1), fill=o.rgb)
            if o.shape == "ring":
                hole = o.radii[0] * side * 0.5
                x, y = o.center[0] * side, o.center[1] * side
                inside = picture.getpixel((min(int(box[0]), side - 1), min(int(box[1]), side - 1)))
                pen.ellipse((x - hole, y - hole, x + hole - 1, y + hole - 1), fill=inside)
        else:
            pen.polygon([(x * side - 0.5, y * side - 0.5) for x, y in o.points], fill=o.rgb)
    if scale > 1:
        picture = picture.reduce(scale)
    if scene.word:
        font = _font(round(image_size * 0.19))
        corner = (scene.word_box[0] * image_size, scene.word_box[1] * image_size)
        ImageDraw.Draw(picture).text(
            corner, scene.word, fill=scene.word_rgb, font=font, anchor="lt"
        )
    return picture


def _third(value: float) -> int:
    return 0 if value < 0.38 else 1 if value <= 0.62 else 2


def _place(
    rng: Generator, shape: str, color: str, taken: list, shrink: float, count: int
) -> SceneObject:
    """Find room for one shape beside what is `taken`, making it smaller when there is none."""
    top = _MOST[count] * shrink
    radius = (4.0 + (top - 4.0) * rng.random()) / 64
    aspect, turn = math.exp(rng.uniform(-0.9, 0.9)), rng.uniform(-0.2, 0.2)
    turned = rng.random() < 0.3
    while True:
        rx = ry = radius
        if shape == "rectangle":  # the shorter side keeps at least 7 of 64 pixels
            rx, ry = max(radius * min(1, aspect), _THIN), max(radius / max(1, aspect), _THIN)
        elif shape in ("triangle", "diamond"):
            ry = radius * min(1.0, max(0.72, aspect))
        points: tuple[tuple[float, float], ...] = ()
        if shape in _UNIT:
            angle = turn if turned else 0.0
            if shape == "arrow":
                angle += math.pi / 2 * round(turn * 10)
            c, s = math.cos(angle), math.sin(angle)
            points = tuple(
                (x * rx * c - y * ry * s, x * rx * s + y * ry * c) for x, y in _UNIT[shape]
            )
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
            rx, ry = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
            points = tuple((x - middle[0], y - middle[1]) for x, y in points)
        for _ in range(30):
            x = rx + (1 - 2 * rx) * rng.random()
            y = ry + (1 - 2 * ry) * rng.random()
            box = (x - rx, y - ry, x + rx, y + ry)
            if all(_apart(box, other) for other in taken):
                taken.append(box)
                outline = tuple((x + dx, y + dy) for dx, dy in points)
                return SceneObject(shape, color, _shade(rng, color), (x, y), (rx, ry), outline)
        radius *= 0.85  # always ends: four objects of this size and a word leave room somewhere


def _apart(a: tuple, b: tuple, gap: float = 1.5 / 64) -> bool:
    return a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]


def _shade(rng: Generator, color: str) -> tuple[int, int, int]:
    first, second = COLORS[color]
    # Half of all colours are the pure named one: its ends are where pictures really lie.
    mix = max(0.0, 2 * rng.random() - 1)
    noise = rng.integers(-8, 9, size=3).tolist()
    r, g, b = (
        min(255, max(0, round(a + (b - a) * mix) + n))
        for a, b, n in zip(first, second, noise, strict=True)
    )
    return r, g, b


def _background(scene: Scene, size: int) -> Image.Image:
    if scene.texture == "plain":
        return Image.new("RGB", (size, size), scene.background)
    rng = np.random.default_rng(scene.texture_seed)
    base = np.array(scene.background, dtype=np.float32)
    if scene.texture == "noise":
        change = rng.normal(0, 9, (size, size, 1))
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.06, 0.3)
        y, x = np.mgrid[0:size, 0:size] / size
        along = (x * math.cos(angle) + y * math.sin(angle))[..., None]
        wave = np.sign(np.sin(2 * math.pi * along / period)) * 10
        change = wave if scene.texture == "stripes" else (along - 0.5) * 50
    return Image.fromarray(np.clip(base + change, 0, 255).astype(np.uint8))


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont:
    return ImageFont.load_default(size)

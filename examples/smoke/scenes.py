"""The "synthetic" images of the smoke run: scenes of coloured shapes in the six GenEval categories.

A scene is one to four objects on a two-by-two grid of cells (one object alone may also stand in the middle).
Four shapes times six colours give 24 pairs; the pairs in ``HELD_OUT_PAIRS`` never occur in a training image,
caption, question or answer, so that composing them can be tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

Option = TypeVar("Option")

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 215, 40),
    "green": (35, 155, 70),
    "blue": (40, 90, 215),
    "purple": (145, 55, 175),
}
CELLS: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "middle": (0.5, 0.5),
}
"""Cell name to the centre (x, y) of the cell, as shares of the image's side; y grows downwards."""
CORNERS = ("top left", "top right", "bottom left", "bottom right")
CATEGORIES = ("single", "colours", "two", "counting", "position", "attribution")
COUNTS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_PAIRS = frozenset({("circle", "orange"), ("square", "green"), ("triangle", "purple"), ("cross", "blue")})

IMAGE_SIDE = 72
BACKGROUND = (255, 255, 255)
OBJECT_RADIUS = 0.2
"""Half the side of an object's bounding square, as a share of the image's side."""
JITTER = 0.02
"""Largest shift of an object from the centre of its cell, as a share of the image's side."""
_SUPERSAMPLING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One coloured shape; ``x``, ``y`` is its centre in shares of the image's side, y downwards."""

    shape: str
    colour: str
    cell: str
    x: float
    y: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is in an image.  Objects are in reading order: by row, then by column."""

    category: str
    objects: tuple[SceneObject, ...]

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset(item.pair for item in self.objects)


def training_pairs() -> tuple[tuple[str, str], ...]:
    """The 20 (shape, colour) pairs that training may use."""
    return tuple((s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT_PAIRS)


def _choice(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _placed(rng: np.random.Generator, pair: tuple[str, str], cell: str) -> SceneObject:
    x, y = CELLS[cell]
    dx, dy = rng.uniform(-JITTER, JITTER, size=2)
    return SceneObject(shape=pair[0], colour=pair[1], cell=cell, x=x + float(dx), y=y + float(dy))


def sample_scene(rng: np.random.Generator, category: str, *, pairs: tuple[tuple[str, str], ...]) -> Scene:
    """Draw a scene of ``category`` whose objects use only ``pairs``.

    Scenes with two objects use two different shapes in two different colours, next to each other in a row or a
    column, so that every relation between them is unambiguous.

    Raises:
        ValueError: if the category is unknown, or ``pairs`` cannot furnish two objects that differ in both.
    """
    cells: tuple[str, ...]
    chosen: tuple[tuple[str, str], ...]
    if category in ("single", "colours"):
        cells = (_choice(rng, (*CORNERS, "middle")),)
        chosen = (_choice(rng, pairs),)
    elif category == "counting":
        count = int(_choice(rng, tuple(COUNTS)))
        cells = tuple(CORNERS[i] for i in sorted(rng.choice(4, size=count, replace=False)))
        chosen = (_choice(rng, pairs),) * count
    elif category in ("two", "position", "attribution"):
        first = _choice(rng, pairs)
        others = [p for p in pairs if p[0] != first[0] and p[1] != first[1]]
        if not others:
            raise ValueError(f"no pair differs from {first} in shape and colour among {pairs}")
        chosen = (first, _choice(rng, others))
        neighbours = ((0, 1), (2, 3), (0, 2), (1, 3))
        cells = tuple(CORNERS[i] for i in _choice(rng, neighbours))
    else:
        raise ValueError(f"unknown scene category {category!r}; known: {', '.join(CATEGORIES)}")
    return Scene(category=category, objects=tuple(_placed(rng, p, c) for p, c in zip(chosen, cells, strict=True)))


def shape_outline(shape: str, x: float, y: float, radius: float) -> tuple[str, list[tuple[float, float]]]:
    """Return the PIL primitive (``ellipse`` or ``polygon``) and its points for a shape around (x, y).

    Raises:
        ValueError: if the shape is unknown.
    """
    if shape == "circle":
        return "ellipse", [(x - radius, y - radius), (x + radius, y + radius)]
    if shape == "square":
        r = 0.86 * radius
        return "polygon", [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return "polygon", [(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]
    if shape == "cross":
        a, b = radius, 0.36 * radius
        corners = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
        return "polygon", [(x + dx, y + dy) for dx, dy in corners]
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def draw_scene(scene: Scene, *, side: int = IMAGE_SIDE) -> Image.Image:
    """Draw a scene as an RGB image of ``side`` x ``side`` pixels, antialiased by supersampling."""
    large = side * _SUPERSAMPLING
    image = Image.new("RGB", (large, large), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        primitive, points = shape_outline(item.shape, item.x * large, item.y * large, OBJECT_RADIUS * large)
        getattr(pen, primitive)(points, fill=COLOURS[item.colour])
    return image.reduce(_SUPERSAMPLING)

"""An independent reader of scene images: classical image analysis, no network, nothing learned from the model.

``read_scene`` finds coloured regions by their distance from the white background, splits them by colour, names
the colour by the nearest palette entry in a hue-dominated space, and the shape by comparing the region with
outlines of the four shapes at the region's place and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from examples.smoke.scene_text import relation
from examples.smoke.scenes import CELLS, COLOURS, OBJECT_RADIUS, SHAPES, Scene, SceneObject, shape_outline

WORK_SIDE = 96
"""Images are resized to this side before they are read."""
MIN_CHROMA = 70
"""Smallest max-minus-min over the RGB channels (0..255) of a pixel that belongs to an object."""
MIN_AREA_SHARE = 0.18
"""Regions smaller than this share of an object's bounding square are specks."""
MIN_OVERLAP = 0.45
"""Regions whose best outline overlaps less (intersection over union) are no shape at all."""
_TEMPLATE_SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundObject:
    """A region read as an object: as ``SceneObject``, with ``overlap`` the IoU with the shape's outline."""

    shape: str
    colour: str
    x: float
    y: float
    overlap: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    """Each shape's outline, cropped to its bounding box and stretched to a square: bool ``[32, 32]``."""
    templates = {}
    for shape in SHAPES:
        canvas = Image.new("L", (256, 256), 0)
        primitive, points = shape_outline(shape, 128, 128, 100)
        getattr(ImageDraw.Draw(canvas), primitive)(points, fill=255)
        templates[shape] = _stretched(np.asarray(canvas) > 127)
    return templates


def _stretched(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(crop.astype(np.uint8) * 255).resize(
        (_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BILINEAR
    )
    return np.asarray(image) > 127


def _name_shape(mask: np.ndarray) -> tuple[str, float]:
    patch = _stretched(mask)
    overlaps = {s: float((patch & t).sum() / (patch | t).sum()) for s, t in _templates().items()}
    best = max(overlaps, key=overlaps.__getitem__)
    return best, overlaps[best]


def _palette_index(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of float pixels ``[..., 3]``, comparing saturated directions, not
    brightness."""

    def direction(rgb: np.ndarray) -> np.ndarray:
        low = rgb.min(-1, keepdims=True)
        return (rgb - low) / np.maximum(rgb.max(-1, keepdims=True) - low, 1.0)

    palette = direction(np.asarray(list(COLOURS.values()), dtype=np.float32))
    return ((direction(pixels)[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


def read_scene(image: np.ndarray) -> tuple[FoundObject, ...]:
    """Read the objects of an image, uint8 ``[H, W, 3]``, in reading order.

    Raises:
        ValueError: if the image is not uint8 RGB.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image is uint8 [H, W, 3], got {image.dtype} {image.shape}")
    resized = Image.fromarray(image).resize((WORK_SIDE, WORK_SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)
    coloured = (pixels.max(-1) - pixels.min(-1)) >= MIN_CHROMA
    regions, count = ndimage.label(coloured)
    smallest = MIN_AREA_SHARE * (2 * OBJECT_RADIUS * WORK_SIDE) ** 2
    colours = list(COLOURS)
    objects = []
    for region in range(1, count + 1):
        mask = regions == region
        if mask.sum() < smallest:
            continue
        shape, overlap = _name_shape(mask)
        if overlap < MIN_OVERLAP:
            continue
        core = ndimage.binary_erosion(mask, iterations=2)
        votes = np.bincount(_palette_index(pixels[core if core.any() else mask]), minlength=len(colours))
        rows, columns = np.nonzero(mask)
        objects.append(
            FoundObject(
                shape=shape,
                colour=colours[int(votes.argmax())],
                x=float((columns.min() + columns.max() + 1) / 2 / WORK_SIDE),
                y=float((rows.min() + rows.max() + 1) / 2 / WORK_SIDE),
                overlap=overlap,
            )
        )
    return tuple(sorted(objects, key=lambda item: (item.y > 0.5, item.x)))


def nearest_cell(x: float, y: float) -> str:
    """The name of the grid cell whose centre is nearest to (x, y), both in shares of the side."""
    return min(CELLS, key=lambda cell: (CELLS[cell][0] - x) ** 2 + (CELLS[cell][1] - y) ** 2)


def _as_scene_object(item: FoundObject) -> SceneObject:
    return SceneObject(shape=item.shape, colour=item.colour, cell=nearest_cell(item.x, item.y), x=item.x, y=item.y)


def satisfies(objects: tuple[FoundObject, ...], scene: Scene) -> bool:
    """Whether the objects read from an image are what the scene's prompt (``scene_prompt``) asks for.

    The image must show exactly the objects asked for, no more; properties that the prompt leaves free
    (for instance the colour of "a circle") may be anything.
    """
    expected = scene.objects
    if len(objects) != len(expected):
        return False
    shapes_agree = sorted(f.shape for f in objects) == sorted(w.shape for w in expected)
    if scene.category in ("single", "two", "counting"):
        return shapes_agree
    if scene.category in ("colours", "attribution"):
        return sorted(f.pair for f in objects) == sorted(w.pair for w in expected)
    if not shapes_agree:
        return False
    by_shape = {item.shape: _as_scene_object(item) for item in objects}
    first, second = expected
    return relation(by_shape[first.shape], by_shape[second.shape]) == relation(first, second)

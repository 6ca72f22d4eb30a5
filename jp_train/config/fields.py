"""How a recipe names places in a sample (`fields` of a source) and conditions on its metadata (`filter`).

A place is `EXTENSION`, a whole file as text, or `EXTENSION:PATH`: keys and list positions in its JSON, as in
`json:image.captions[0]`, where `[*]` is every entry of a list. `A;B` is the first of two that a sample has. A condition
is `PLACE COMPARISON VALUE`; a place without extension is one in `.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jp_train.errors import ConfigError, did_you_mean

ROLES = {
    "understanding": ("image", "conversations", "question", "answer", "caption", "text", "system"),
    "text": ("text", "conversations", "question", "answer", "system"),
    "generation": ("image", "caption"),
}
"""What a sample of each kind is made of, as `fields` names it."""
ALL = "*"
ORDERED = ("<", "<=", ">", ">=")

_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[(\d+|\*)\])*")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+|\*)\]")
_FILTER = re.compile(r"\s*([^\s<>=!]+)\s*(==|!=|<=|>=|<|>|\bin\b)\s*(\S.*?)\s*")


@dataclass(frozen=True, slots=True)
class Place:
    """One place of a sample: a file by its extension, and where in its JSON (`path`: keys, positions, `*` for all
    entries; None: the file itself is the text)."""

    extension: str
    path: tuple[str | int, ...] | None = None

    def __str__(self) -> str:
        return f".{self.extension}" if self.path is None else f'"{self._steps}" of .{self.extension}'

    @property
    def spec(self) -> str:
        """As `fields` of a recipe has it."""
        return self.extension if self.path is None else f"{self.extension}:{self._steps}"

    @property
    def _steps(self) -> str:
        steps = [f"[{step}]" if isinstance(step, int) or step == ALL else f".{step}" for step in self.path or ()]
        return "".join(steps).lstrip(".")


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on a sample's metadata: `text` as in the recipe, in one spelling; `values` are numbers where
    `compare` is one of ORDERED."""

    text: str
    place: Place
    compare: str
    values: tuple[Any, ...]


def parse_fields(kind: str, fields: Mapping[str, str]) -> dict[str, tuple[Place, ...]]:
    """The places of each role. Raises ConfigError for a role that the kind does not have, and a text that is no
    place."""
    for role in fields:
        if role not in ROLES[kind]:
            raise ConfigError(
                f"fields.{role}: a source of kind {kind} has the fields {', '.join(ROLES[kind])}"
                f"{did_you_mean(role, ROLES[kind])}"
            )
    if ("question" in fields) != ("answer" in fields):
        raise ConfigError("fields: question and answer belong together; give both, or `caption` for an answer alone")
    images = parse_images(fields.get("image"))
    if len(images) > 1 and kind != "understanding":
        raise ConfigError(f"fields.image: a {kind} sample has one image, found {len(images)}")
    return {role: tuple(map(_place, text.split(";"))) for role, text in fields.items() if role != "image"}


def parse_images(text: str | None) -> tuple[tuple[str, ...], ...]:
    """The extensions of each image of a sample: `left.png;left.jpg, right.png` are two images, the first of which has
    one of two names; None gives none. Raises ConfigError for what is no extension."""
    images = [] if text is None else [tuple(map(_place, part.split(";"))) for part in text.split(",")]
    for place in (place for image in images for place in image):
        if place.path is not None:
            raise ConfigError(f"fields.image: {place} is a text; name the extension of the image file, as `jpg;png`")
    return tuple(tuple(place.extension for place in image) for image in images)


def parse_filter(text: str) -> Filter:
    """One condition. Raises ConfigError for a text that is none."""
    match = _FILTER.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"filter {text!r} cannot be read; write PLACE COMPARISON VALUE with one of == != < <= > >= in, as "
            "'width >= 384', 'status == success' or 'language in [en, de]'"
        )
    name, compare, value = match.groups()
    values = tuple(map(_literal, value.strip("[]").split(","))) if compare == "in" else (_literal(value),)
    if compare in ORDERED:
        limit = number(values[0])
        if limit is None:
            raise ConfigError(f"filter {text!r}: {compare} compares numbers, and {value} is none")
        values = (limit,)
    return Filter(f"{name} {compare} {value}", _place(name if ":" in name else f"json:{name}"), compare, values)


def number(value: Any) -> float | None:
    """The number that a value is or spells; None for anything else."""
    try:
        return None if isinstance(value, (bool, list, dict)) else float(value)
    except (TypeError, ValueError):
        return None


def _place(text: str) -> Place:
    extension, colon, path = text.strip().partition(":")
    extension = extension.lower().lstrip(".")
    if not extension or (colon and not _PATH.fullmatch(path)):
        raise ConfigError(
            f"{text!r} is no place in a sample; write the extension of a file, as `txt`, or keys of its JSON, as "
            "`json:caption`, `json:image.captions[0]` or `json:captions[*]`"
        )
    if not colon:
        return Place(extension)
    return Place(extension, tuple(key or (ALL if index == ALL else int(index)) for key, index in _STEP.findall(path)))


def _literal(text: str) -> Any:
    text = text.strip()
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("'\"")

"""Which files of a sample, and which places in their JSON, are its image, caption, text or conversation; and which
samples a source leaves out by their metadata.

`fields` and `filter` of a source say so (config/fields.py). Without `fields` the usual names are looked for. Null
counts as absent. Of a place with `[*]` every epoch draws one entry.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jp_train.config.choices import ClassPrompt, Crop
from jp_train.config.fields import ALL, ORDERED, Filter, Place, number, parse_fields, parse_filter, parse_images
from jp_train.config.schema import SourceConfig
from jp_train.data.sample_map import TEXT_ENDINGS, SampleMap, find_sample_map
from jp_train.data.tar_samples import collapsed
from jp_train.errors import DataError, SkipSample
from jp_train.types import Kind, RawSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "jpe", "avif")
VQ_EXTENSION = "vq.npy"

_NUMBERED = re.compile(rf"(\d+)\.({'|'.join(IMAGE_EXTENSIONS)})")
"""Several images of an understanding sample: `{key}.0.jpg`, `{key}.1.png`, ..."""
_CAPTION = "json:caption[*];json:caption;txt;json:TEXT;json:captions[*]"
_DIALOGUE = "json:conversations;json:messages"
USUAL = {
    Kind.UNDERSTANDING: {
        "conversations": f"{_DIALOGUE};json:texts",
        "caption": _CAPTION,
        "text": "json:text",
        "system": "json:system",
    },
    Kind.TEXT: {"text": "txt;json:text", "conversations": _DIALOGUE, "system": "json:system"},
    Kind.GENERATION: {"caption": _CAPTION},
}
"""Where the texts of a kind are looked for where its source says nothing."""

_COMPARISONS = dict(zip(ORDERED, (operator.lt, operator.le, operator.gt, operator.ge), strict=True))
_CLASS = "cls"
_NAMED_OTHERS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class FieldMap:
    """What the samples of a source are made of. `image`: the extensions of each image that the recipe names, empty for
    the usual names; `places`: of the texts, by role; `text_extensions`: of the files that texts and filters are in;
    `configured`: the recipe names the places; `mapping`: the user's function that these texts come from."""

    kind: Kind
    image: tuple[tuple[str, ...], ...]
    places: Mapping[str, tuple[Place, ...]]
    filters: tuple[Filter, ...]
    text_extensions: frozenset[str]
    class_names: tuple[str, ...]
    class_prompt: ClassPrompt
    class_template: str
    configured: bool
    mapping: SampleMap | None = None

    def needed(self, extensions: Collection[str], crop: Crop = Crop.centre) -> list[str]:
        """Which of a sample's files must be read to make it.

        Stored VQ ids replace the image, except with a random crop: the ids are those of the centre crop.
        """
        images = [extension for extension in extensions if self.is_image(extension)]
        texts = list(filter(self.is_text, extensions))
        if self.kind is Kind.GENERATION and VQ_EXTENSION in extensions:
            return [*texts, *images] if images and crop is not Crop.centre else [*texts, VQ_EXTENSION]
        return texts + images

    def is_text(self, extension: str) -> bool:
        """Whether texts and filters, or the user's function, read files of this extension."""
        if self.mapping is not None and extension.rpartition(".")[2] in TEXT_ENDINGS:
            return True
        return extension in self.text_extensions

    def is_image(self, extension: str) -> bool:
        """Whether files of this extension are images of a sample."""
        if self.image:
            return any(extension in names for names in self.image)
        numbered = self.kind is Kind.UNDERSTANDING and _NUMBERED.fullmatch(extension)
        return extension in IMAGE_EXTENSIONS or bool(numbered)

    def images(self, extensions: Collection[str]) -> tuple[str, ...]:
        """The extensions of a sample's images, in order. Raises SkipSample where which they are is not clear, or one
        that the recipe names is absent."""
        return _images_among(self, tuple(extensions))

    @property
    def fingerprint(self) -> str:
        """Everything of the source that decides which samples are used and what their texts are, beyond the usual
        names; empty where it says nothing."""
        if not (self.configured or self.filters or self.class_names or self.mapping):
            return ""
        named = {role: [str(place) for place in places] for role, places in self.places.items()}
        image = self.image if len(self.image) > 1 else (self.image or (IMAGE_EXTENSIONS,))[0]
        rules: list[Any] = [named, image, [test.text for test in self.filters], self.class_names]
        rules += [] if self.mapping is None else [self.mapping.name, self.mapping.sha256]
        return json.dumps(rules, sort_keys=True)


@lru_cache(maxsize=1024)
def _images_among(fields: FieldMap, extensions: tuple[str, ...]) -> tuple[str, ...]:
    if fields.image:
        named = [next((name for name in names if name in extensions), "") for names in fields.image]
        if not all(named) and any(named):
            raise SkipSample(f"no image {'; '.join('.' + n for n in fields.image[named.index('')])}", "missing_field")
        return tuple(filter(None, named))
    plain = [extension for extension in extensions if extension in IMAGE_EXTENSIONS]
    numbers = {name: int(match[1]) for name in extensions if (match := _NUMBERED.fullmatch(name))}
    numbered = sorted(numbers, key=numbers.__getitem__) if fields.kind is Kind.UNDERSTANDING else []
    if len(plain) + bool(numbered) > 1 or len(set(numbers.values())) < len(numbers):
        present = ", ".join(f".{name}" for name in [*plain, *numbered])
        raise SkipSample(
            f"several images in one sample: {present}; one is expected "
            "(understanding: also .0.jpg, .1.jpg, ...); `fields: {image: EXTENSION}` of the source says which",
            "extra_field",
        )
    return tuple(plain or numbered)


def field_map(source: SourceConfig) -> FieldMap:
    """The field map of a source. Raises ConfigError for a place, filter or function that cannot be, DataError for a
    list of class names that cannot be read."""
    kind = Kind(source.kind.value)
    places = parse_fields(kind.value, source.fields)
    places = places or parse_fields(kind.value, USUAL[kind])
    filters = tuple(map(parse_filter, source.filter))
    in_texts = [place for role in places.values() for place in role] + [test.place for test in filters]
    return FieldMap(
        kind=kind,
        image=parse_images(source.fields.get("image")),
        places=places,
        filters=filters,
        text_extensions=frozenset(place.extension for place in in_texts),
        class_names=_class_names(source.class_names),
        class_prompt=source.class_prompt,
        class_template=source.class_template,
        configured=bool(source.fields),
        mapping=find_sample_map(source.map) if source.map else None,
    )


class Fields:
    """What one sample has at the places of a FieldMap; each JSON file is parsed once."""

    notes: tuple[str, ...] = ()
    """What was changed to read the sample."""
    _left_out: str = ""

    def __init__(self, raw: RawSample, fields: FieldMap) -> None:
        self.map = fields
        self.raw = raw if fields.mapping is None or raw.token_ids is not None else self._mapped(raw, fields.mapping)
        self.taken: dict[str, Place] = {}
        """Places where something was found, by role."""
        self._parsed: dict[str, dict[str, Any]] = {}

    def first(self, role: str) -> tuple[Place, Any] | None:
        """The first place of a role at which the sample has something, and what: a list for a place with `[*]`.

        Raises SkipSample for a file that is not UTF-8 or not JSON.
        """
        for place in self.map.places.get(role, ()):
            value = self._value(place)
            if value is not None and not (value == [] and ALL in (place.path or ())):
                self.taken[role] = place
                return place, value
        return None

    def absent(self, *roles: str) -> SkipSample:
        """The error of a sample that has none of these roles: what was looked for, and what there is."""
        looked = [str(place) for role in roles for place in self.map.places.get(role, ())]
        message = f"no {' and no '.join(roles)}: looked for {', '.join(looked)}; found {self.present()}"
        hint = "" if self.map.configured else "; `fields` of the source can name another place"
        return SkipSample(message + hint, "missing_field")

    def present(self) -> str:
        """What the sample has, for messages."""
        names = []
        for extension in self.raw.fields:
            keys = ", ".join(f'"{key}"' for key in list(self._parsed.get(extension, ()))[:8])
            names.append(f".{extension}" + (f" with {keys}" if keys else ""))
        others = [f".{extension}" for extension in self.raw.extensions if extension not in self.raw.fields]
        names += [*others[:_NAMED_OTHERS], *["..."][: len(others) > _NAMED_OTHERS]]
        return (", ".join(names) or "no usable field") + collapsed(self.raw.extensions)

    def rejected(self) -> str:
        """The first filter that the sample fails, in words that are equal for equal reasons; empty when it passes
        all. Raises SkipSample as `first`."""
        if self._left_out:
            return self._left_out
        return next((failure for test in self.map.filters if (failure := self._failure(test))), "")

    def _mapped(self, raw: RawSample, mapping: SampleMap) -> RawSample:
        texts = {name: data for name, data in raw.fields.items() if self.map.is_text(name)}
        others = {name: data for name, data in raw.fields.items() if name not in texts}
        result = mapping.apply(raw.info.key, texts)
        if result is None:
            self._left_out = f"by {mapping.name}"
        return replace(raw, fields=(result or {}) | others)

    def _failure(self, test: Filter) -> str:
        value = self._value(test.place)
        if value is None and test.place.path == ("aspect_ratio",):
            width, height = (number(self._value(Place(test.place.extension, (side,)))) for side in ("width", "height"))
            value = width / height if width and height else None
        if value is None:
            return f"not {test.text}: no {test.place}"
        if test.compare in ORDERED:
            size = number(value)
            if size is None:
                return f"not {test.text}: no number"
            return "" if _COMPARISONS[test.compare](size, test.values[0]) else f"not {test.text}"
        matches = any(_equal(value, wanted) for wanted in test.values)
        return "" if matches is (test.compare != "!=") else f"not {test.text}"

    def _value(self, place: Place) -> Any:
        if place.extension not in self.raw.fields:
            return None
        if place.path is None:
            return self._class_name(place) if place.extension.rpartition(".")[2] == _CLASS else self._text(place)
        return _follow(self._json(place.extension), place.path)

    def _text(self, place: Place) -> str:
        try:
            return self.raw.fields[place.extension].decode("utf-8")
        except UnicodeDecodeError as error:
            raise SkipSample(f"{place} is not UTF-8: {error}", "not_utf8") from None

    def _json(self, extension: str) -> dict[str, Any]:
        if extension not in self._parsed:
            try:
                value = json.loads(self.raw.fields[extension].decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise SkipSample(f"malformed .{extension}: it is not UTF-8: {error}", "not_utf8") from None
            except (ValueError, RecursionError) as error:  # ValueError also: a number of more than 4300 digits
                raise SkipSample(f"malformed .{extension}: {error}", "bad_json") from None
            if not isinstance(value, dict):
                raise SkipSample(f".{extension} holds a {type(value).__name__}, expected an object", "bad_type")
            self._parsed[extension] = value
        return self._parsed[extension]

    def _class_name(self, place: Place) -> str:
        text = self._text(place).strip()
        names = self.map.class_names
        if not names:
            return text
        if not text.isdecimal() or int(text) >= len(names):
            raise SkipSample(
                f"{place} holds {text[:40]!r}, expected a class number of 0 to {len(names) - 1}", "bad_class"
            )
        return names[int(text)]


def _equal(value: Any, wanted: Any) -> bool:
    """As people mean it in a recipe: the number 3 and the text "3" are equal."""
    left, right = number(value), number(wanted)
    return bool(value == wanted) if left is None or right is None else left == right


def _follow(value: Any, path: tuple[str | int, ...]) -> Any:
    for position, step in enumerate(path):
        if step == ALL:
            if not isinstance(value, list):
                return None
            rest = [_follow(entry, path[position + 1 :]) for entry in value]
            return [entry for entry in rest if entry is not None]
        if isinstance(step, int):
            if not isinstance(value, list) or step >= len(value):
                return None
        elif not isinstance(value, dict) or step not in value:
            return None
        value = value[step]
    return value


def _class_names(path: str) -> tuple[str, ...]:
    if not path:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"class_names {path}: {error}; expected a text file with the name of class i in line i + 1"
        ) from None
    return tuple(line.strip() for line in lines)

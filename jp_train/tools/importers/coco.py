"""COCO captions: one JSON of `images` and `annotations`, and an image folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jp_train.errors import ConfigError, DataError
from jp_train.files import other_format_at
from jp_train.tools.importers.entries import Chunk, Entry, Listing, Reader, Skip, chunked
from jp_train.tools.importers.files import file_identity
from jp_train.types import Kind

Pair: TypeAlias = "tuple[str, Any, str, Any, tuple[str, str] | None]"
"""Of an entry: where it is in the file, path, slug, caption, and (reason, message) where it is skipped."""


@dataclass(frozen=True, kw_only=True)
class CocoReader(Reader):
    """Entries in the order of `images`, the captions of one image in the order of `annotations`.

    `per` is `caption` (a sample for every caption; an image with five captions is stored five times) or `image` (a
    sample for every image, with its first caption). The file is loaded whole: about 6 times its size in memory.
    """

    format = "coco"
    source: Path
    images: Path
    kind: Kind
    per: str = "caption"

    def options(self) -> dict[str, Any]:
        return {"per": self.per, "images": str(self.images.absolute())}

    def listing(self) -> Listing:
        images, captions = self._load()
        entries = list(_pairs(images, captions, self.per))
        return Listing(
            identity={self.source.name: file_identity(self.source)}, total=len(entries), chunks=lambda: chunked(entries)
        )

    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        for place, (where, path, slug, caption, problem) in enumerate(chunk.payload):
            name, number = f"{self.source.name} {where}", chunk.first + place
            if problem is not None:
                yield Entry(number=number, name=name, skip=Skip(*problem))
                continue
            yield Entry(
                number=number, name=name, note={"caption": caption, "source_id": name}, images=(path,), slug=slug
            )

    def _load(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not self.source.is_file():
            raise ConfigError(
                f"SOURCE {self.source} is not a file; expected COCO's captions JSON, "
                "for example annotations/captions_train2017.json"
            )
        try:
            with open(self.source, encoding="utf-8-sig") as file:
                value = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            what = other_format_at(self.source) or f"cannot be read as JSON: {error}; download it again"
            raise DataError(f"{self.source} {what}") from None
        except MemoryError:
            raise DataError(
                f"{self.source} does not fit into memory: it needs about 6 times its size; split it by images"
            ) from None
        for part in ("images", "annotations"):
            if not isinstance(value, dict) or not isinstance(value.get(part), list):
                raise ConfigError(f'{self.source} is not a COCO captions file: it has no list "{part}"')
        return value["images"], value["annotations"]


def _pairs(images: list[dict[str, Any]], annotations: list[dict[str, Any]], per: str) -> Iterator[Pair]:
    """What the listing holds, of every entry."""
    captions: dict[Any, list[tuple[Any, Any]]] = {}
    broken = []
    for place, annotation in enumerate(annotations):
        if lacks := _lacks(annotation, "image_id", "caption"):
            broken.append((f"annotation at place {place}", None, "", None, ("bad_record", lacks)))
        else:
            captions.setdefault(annotation["image_id"], []).append((annotation.get("id", place), annotation["caption"]))
    for place, image in enumerate(images):
        if lacks := _lacks(image, "id", "file_name"):
            yield f"image at place {place}", None, "", None, ("bad_record", lacks)
            continue
        image_id, path = image["id"], image["file_name"]
        of_image = captions.pop(image_id, [])
        if not of_image:
            yield f"image {image_id}", path, "", None, ("no_caption", f"image {path} has no caption")
        for caption_id, caption in of_image[:1] if per == "image" else of_image:
            wrong = (
                None
                if isinstance(path, str)
                else ("bad_record", f'"file_name" is a {type(path).__name__}, expected text')
            )
            yield f"image {image_id} annotation {caption_id}", path, f"{image_id}-{caption_id}", caption, wrong
    for image_id, left in captions.items():
        for caption_id, _ in left:
            missing = ("image_missing", f"no image has the id {image_id}, or an earlier one had it too")
            yield f"image {image_id} annotation {caption_id}", None, "", None, missing
    yield from broken


def _lacks(value: Any, identifier: str, text: str) -> str:
    """What is missing in an object of `images` or `annotations`; empty where nothing is."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__} instead of an object"
    missing = [f'"{name}"' for name in (identifier, text) if name not in value]
    if missing:
        return f"no {' and no '.join(missing)}"
    if isinstance(value[identifier], (dict, list)):
        return f'"{identifier}" is a {type(value[identifier]).__name__}, expected a number or text'
    return ""

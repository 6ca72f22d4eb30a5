"""What a reader of a layout returns: chunks of entries, entries, and the reasons why an entry is skipped."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jp_train.errors import SkipSample
from jp_train.types import Kind

REASONS = {
    "binary": "binary data, no text",
    "bad_record": "the line, row or record cannot be read",
    "image_no_file": "the image is not a regular file",
    "image_missing": "no such image in the image folder",
    "image_outside": "the path leaves the image folder (absolute, .., or a link)",
    "image_too_large": "more pixels or bytes than allowed",
    "image_undecodable": "not an image that can be decoded",
    "multi_image": "more than one image in an entry of a generation source, or in two columns",
    "no_caption": "an image without a caption",
    "no_image": "an entry without an image",
    "not_unicode": "text that is not valid UTF-8",
    "unread_media": "an image, video or sound that the import does not read: no conversation of text",
    "text_only": "a conversation without an image; --text-out FOLDER keeps them",
}
"""Why an entry is skipped, as in `skipped.jsonl` and the summary. Other reasons there are the training loader's classes
of fault."""
REJECTED = "the training loader would reject the sample"

HOUSEKEEPING = "housekeeping"
"""Files that are no data: names that start with a dot, and what Spark and Hadoop leave."""

SAMPLED = 200
"""Entries whose images (or documents) a dry run reads."""
CHUNK_ENTRIES = 64
CHUNK_LINES = 512
CHUNK_BYTES = 1 << 20
"""The size of a chunk: at most this many images, or this many lines with about this much text."""


class Skip(SkipSample):
    """An entry that becomes no sample: `fault` is one of REASONS, or the class of fault with which the training loader
    rejects the sample."""

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message, fault)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Skip, (self.fault, str(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of a listing.

    `number` is its place in the listing, from 0; `name` is how people find it in the source ("captions.json annotation
    17", "a.jsonl:4"); `note` becomes the sample's JSON; `images` are paths inside the image folder, or images' bytes;
    `skip` is set instead where the listing alone shows that there is no sample.
    """

    number: int
    name: str
    note: dict[str, Any] | None = None
    images: tuple[str | bytes, ...] = ()
    slug: str = ""
    """Text that follows the number in the sample's key, for people."""
    text_only: bool = False
    """A conversation without an image from a source of images."""
    skip: Skip | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive entries, the unit of work of a process: `count` entries from number `first`; `payload` is for the
    reader that made it; `done` is where in the listing the chunk ends, in the units of `Listing.total`."""

    first: int
    count: int
    payload: Any
    done: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a source holds. `identity` maps each part of it ("captions.json", "class n01440764") to a text that
    changes with its content: an import is resumed only on an equal identity. `total` is its length in the units of
    `Chunk.done`."""

    identity: dict[str, str]
    total: int
    chunks: Callable[[], Iterator[Chunk]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files of the source that are not read, by the endings of their names."""
    remarks: tuple[str, ...] = ()
    """How the source was understood, one remark a line, for the person who imports it."""

    @property
    def told(self) -> tuple[str, ...]:
        """The remarks, and what is left out."""
        return (*filter(None, (*self.remarks, left_out_text(self.left_out))),)


class Reader(ABC):
    """A layout of a source. Readers are small and picklable, as worker processes get a copy."""

    format: str
    kind: Kind
    source: Path
    images: Path | None
    """The folder that image paths are relative to; None where images come as bytes, or not at all."""
    surveyed = SAMPLED
    """Chunks that a dry run may read a second time, with their images, for its entries."""

    @abstractmethod
    def listing(self) -> Listing:
        """Raises ConfigError for a source that is not this layout, DataError for one that cannot be read."""

    @abstractmethod
    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        """The entries of a chunk, numbered; `image_bytes=False` lets a reader leave them out (a dry run)."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options that decide the shards' content, as JSON values."""

    def source_keys(self) -> dict[str, str]:
        """Keys of a recipe's source beside `kind` and `shards`."""
        return {}

    def default_class_prompt(self) -> str:
        """`class_prompt` of the source that the samples are checked with."""
        return self.source_keys().get("class_prompt", "as_is")


def sample_key(entry: Entry) -> str:
    """The sample's key: the entry's place in the listing in 9 digits, and its slug in characters that every tool
    takes."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", entry.slug).strip("_")[:60]
    return f"{entry.number:09d}-{slug}" if slug else f"{entry.number:09d}"


def left_out_text(left_out: Mapping[str, int]) -> str:
    """`left out: 1 *.parquet, 3 without ending (and 2 of housekeeping: …)`, empty where nothing was."""
    if not left_out:
        return ""
    files = ", ".join(f"{count:,} {label}" for label, count in sorted(left_out.items()) if label != HOUSEKEEPING)
    aside = left_out.get(HOUSEKEEPING, 0)
    marks = f"{aside:,} of housekeeping: names with a dot in front, _SUCCESS, *.crc" if aside else ""
    return f"left out: {files or 'nothing'}{f' (and {marks})' if marks else ''}"


def chunked(items: Sequence[Any]) -> Iterator[Chunk]:
    """Chunks of a listing whose units are its items."""
    for first in range(0, len(items), CHUNK_ENTRIES):
        part = items[first : first + CHUNK_ENTRIES]
        yield Chunk(first=first, count=len(part), payload=part, done=first + len(part))

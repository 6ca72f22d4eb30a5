"""An entry -> a sample that the training loader accepts, or the reason why there is none. Runs in worker processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jp_train.config.choices import ClassPrompt, SourceKind
from jp_train.config.schema import SourceConfig
from jp_train.data.field_map import FieldMap, Fields, field_map
from jp_train.data.samples import check_field_size, parse_variants
from jp_train.data.writer import pack_sample
from jp_train.errors import SkipSample
from jp_train.tools.importers.entries import Chunk, Entry, Reader, Skip, sample_key
from jp_train.tools.importers.images import read_inside, refuse_address, shard_image
from jp_train.types import Kind, RawSample, SourceInfo

MAIN, TEXT = "shards", "text"
"""The outputs of an import: the source's own shards, and those of --text-out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryResult:
    """What became of an entry: a sample for `output`, as tar members, `converted` of its images converted, or `reason`
    and `message` of why it is skipped."""

    number: int
    name: str
    output: str = MAIN
    packed: bytes | None = None
    converted: int = 0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRules:
    """How entries become samples: the reader, whether images are decoded whole, the pixels they may have, and
    whether conversations without an image have an output."""

    reader: Reader
    decode: bool
    max_image_pixels: int
    keep_text_only: bool


def make_chunk(chunk: Chunk, rules: SampleRules) -> list[EntryResult]:
    """The samples and skips of a chunk, in order. Raises DataError for I/O errors."""
    return [make_sample(entry, rules) for entry in rules.reader.entries(chunk)]


def make_sample(entry: Entry, rules: SampleRules) -> EntryResult:
    """The sample of an entry, checked by the same code that reads it in training. Raises DataError for I/O errors."""
    try:
        if entry.skip is not None:
            raise entry.skip
        reader = rules.reader
        kind = reader.kind
        fields: dict[str, bytes] = {}
        converted = 0
        if entry.text_only:
            if not rules.keep_text_only:
                raise Skip(
                    "text_only",
                    "the conversation has no image; --text-out FOLDER writes such conversations into shards of their "
                    "own",
                )
            kind = Kind.TEXT
        elif kind is not Kind.TEXT:
            if not entry.images:
                raise Skip("no_image", "the entry has no image")
            for number, image in enumerate(entry.images):
                data = _image_bytes(image, reader.images)
                extension, data, changed = shard_image(data, rules.max_image_pixels, decode=rules.decode)
                fields[f"{number}.{extension}" if len(entry.images) > 1 else extension] = data
                converted += changed
        key = sample_key(entry)
        fields["json"] = _json(entry)
        check_sample(key, fields, kind, reader.default_class_prompt() if kind is reader.kind else "as_is")
        return EntryResult(
            number=entry.number,
            name=entry.name,
            output=TEXT if entry.text_only else MAIN,
            packed=pack_sample(key, fields),
            converted=converted,
        )
    except Skip as skip:
        return EntryResult(number=entry.number, name=entry.name, reason=skip.fault, message=str(skip))


def check_sample(key: str, fields: dict[str, bytes], kind: Kind, class_prompt: str = "as_is") -> None:
    """Parse the sample as training does, without decoding its image. Raises Skip with the loader's reason."""
    usual = field_map(SourceConfig(kind=SourceKind(kind.value), class_prompt=ClassPrompt(class_prompt)))
    light = {extension: data if extension in usual.text_extensions else b"" for extension, data in fields.items()}
    try:
        for extension, data in fields.items():
            check_field_size(extension, len(data))
    except SkipSample as error:
        raise Skip(error.fault, str(error)) from None
    read_texts(RawSample(info=SourceInfo(source="", shard="", key=key), fields=light), usual)


def read_texts(raw: RawSample, fields: FieldMap) -> Fields:
    """The texts of a sample that training can use, with where they lie. Raises Skip with the loader's reason."""
    texts = Fields(raw, fields)
    try:
        parse_variants(texts, image_slots=1, codebook_size=1)
    except SkipSample as error:
        raise Skip(error.fault, str(error)) from None
    return texts


def _image_bytes(image: str | bytes, images: Path | None) -> bytes:
    if isinstance(image, bytes):
        return image
    refuse_address(image)
    if images is None:
        raise Skip("image_missing", f"{image!r} is a path, but no image folder is given: name it with --images")
    return read_inside(images, image)


def _json(entry: Entry) -> bytes:
    try:
        return json.dumps(entry.note, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Skip("not_unicode", f"text with a lone surrogate, or bytes that are not UTF-8: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Skip("bad_record", f"the record cannot be written as JSON: {error}") from None

"""Records in JSONL, JSON arrays, CSV and TSV: LLaVA/ShareGPT conversations, image-text pairs, and text.

`record_entry` and `Columns` say what a record means, whatever file it is from; `RecordReader` finds records in files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.entries import CHUNK_ENTRIES, CHUNK_LINES, Chunk, Entry, Listing, Reader, Skip
from jp_train.tools.importers.files import (
    array_items,
    file_names,
    identity_of,
    is_array,
    line_chunks,
    parse_json,
    source_files,
    total_bytes,
)
from jp_train.types import Kind

RECORD_PATTERNS = ("*.jsonl", "*.ndjson", "*.jsonl.gz", "*.ndjson.gz", "*.json.gz", "*.json", "*.csv", "*.tsv")
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_CELL = 64 << 20
IMAGE_MARKER_PREFIX = "<image>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of a record hold what.

    Text sources read `conversations` where a record has it, else `text`. Understanding sources read `conversations`,
    else `question` + `caption` (where `question` is named), else `caption`. Generation sources read `caption`.
    """

    image: str = "image"
    caption: str = "caption"
    question: str | None = None
    text: str = "text"
    conversations: str = "conversations"
    id: str = "id"

    def used(self, kind: Kind) -> list[str]:
        """Columns that an import of `kind` may read."""
        if kind is Kind.TEXT:
            return [self.text, self.conversations, "messages", self.id]
        if kind is Kind.GENERATION:
            return [self.image, self.caption, self.id]
        return [
            self.image,
            self.caption,
            *([self.question] if self.question else []),
            self.conversations,
            "messages",
            self.id,
        ]


def record_entry(record: Any, number: int, name: str, columns: Columns, kind: Kind) -> Entry:
    """The entry of a record; a fault of the record becomes the entry's `skip`."""
    try:
        if not isinstance(record, Mapping):
            raise Skip("bad_record", f"a {type(record).__name__} instead of an object with named values")
        note = {**_note(record, columns, kind), "source_id": name}
        slug = record.get(columns.id)
        slug = str(slug) if isinstance(slug, (str, int)) else ""
        if kind is Kind.TEXT:
            return Entry(number=number, name=name, note=note, slug=slug)
        image = _image(record, columns)
        if image is None and "conversations" in note:
            return Entry(number=number, name=name, note=note, slug=slug, text_only=True)
        if image is None:
            raise Skip("no_image", f'"{columns.image}" is empty; the record has {_names(record)}')
        return Entry(number=number, name=name, note=note, image=image, slug=slug)
    except Skip as skip:
        return Entry(number=number, name=name, skip=skip)


def _note(record: Mapping[str, Any], columns: Columns, kind: Kind) -> dict[str, Any]:
    conversations = record.get(columns.conversations)
    if conversations is None:
        conversations = record.get("messages")
    if conversations is not None and kind is not Kind.GENERATION:
        return {"conversations": _turns(conversations)}
    if kind is Kind.TEXT:
        return {"text": _value(record, columns.text)}
    if columns.question is not None and kind is Kind.UNDERSTANDING:
        question, answer = _value(record, columns.question), _value(record, columns.caption)
        return {
            "conversations": [
                {"from": "human", "value": IMAGE_MARKER_PREFIX + question},
                {"from": "gpt", "value": answer},
            ]
        }
    return {"caption": _value(record, columns.caption)}


def _turns(conversations: Any) -> Any:
    """Messages of `role` and `content` as `from` and `value`; anything else is left to the sample check."""
    if not isinstance(conversations, list):
        return conversations
    return [
        {"from": turn["role"], "value": turn.get("content")}
        if isinstance(turn, dict) and "role" in turn and "from" not in turn
        else turn
        for turn in conversations
    ]


def _value(record: Mapping[str, Any], column: str) -> str:
    if column not in record:
        raise Skip("bad_record", f'no "{column}"; the record has {_names(record)}')
    value = record[column]
    if not isinstance(value, str):
        raise Skip("bad_record", f'"{column}" is a {type(value).__name__}, expected text')
    return value


def _image(record: Mapping[str, Any], columns: Columns) -> str | bytes | None:
    image = record.get(columns.image)
    if isinstance(image, list):
        if len(image) > 1:
            raise Skip("multi_image", f'"{columns.image}" lists {len(image)} images; jp_train takes one a sample')
        image = image[0] if image else None
    if isinstance(image, Mapping):  # the Image feature of Hugging Face datasets
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None or image == "" or image == b"":
        return None
    if not isinstance(image, (str, bytes)):
        raise Skip(
            "bad_record", f'"{columns.image}" is a {type(image).__name__}, expected a path or the bytes of an image'
        )
    return image


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in list(record)[:8]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class RecordReader(Reader):
    """A file of records, or several of one type: `.jsonl`/`.ndjson` (also `.gz`), `.json` (an array, or a record a
    line), `.csv`/`.tsv` with a header line."""

    format: str = "pairs"
    source: Path
    images: Path | None
    kind: Kind
    columns: Columns = field(default_factory=Columns)

    def options(self) -> dict[str, Any]:
        return {"columns": asdict(self.columns), "images": None if self.images is None else str(self.images.absolute())}

    def listing(self) -> Listing:
        files = source_files(self.source, RECORD_PATTERNS, "records")
        types = {_type(path) for path in files}
        if len(types) > 1:
            raise ConfigError(
                f"SOURCE {self.source} mixes {' and '.join(sorted(types))} files; "
                f"name one type with a glob, for example '{self.source}/*.jsonl'"
            )
        chunks = {"csv": _csv_chunks, "array": _array_chunks, "lines": line_chunks}[types.pop()]
        most = CHUNK_LINES if self.kind is Kind.TEXT else CHUNK_ENTRIES
        return Listing(identity=identity_of(files), total=total_bytes(files), chunks=lambda: chunks(files, most))

    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        file, start, payload = chunk.payload
        for place, item in enumerate(payload):
            number, name = chunk.first + place, f"{file}:{start + place}"
            if isinstance(item, bytes):
                if not item.strip():
                    continue
                try:
                    item = parse_json(item)
                except UnicodeDecodeError as error:
                    yield Entry(number=number, name=name, skip=Skip("not_unicode", f"the record is not UTF-8: {error}"))
                    continue
                except ValueError as error:
                    yield Entry(
                        number=number,
                        name=name,
                        skip=Skip("bad_record", f"the record is no JSON that can be read: {error}"),
                    )
                    continue
            elif isinstance(item, Skip):
                yield Entry(number=number, name=name, skip=item)
                continue
            yield record_entry(item, number, name, self.columns, self.kind)


def record_reader(name: str, source: Path, images: Path | None, kind: str, columns: Columns) -> RecordReader:
    """A reader of records with images; without an image folder, paths start in the source's folder."""
    if images is None:
        images = source if source.is_dir() else source.parent
    return RecordReader(format=name, source=source, images=images, kind=Kind(kind), columns=columns)


def _type(path: Path) -> str:
    name = path.name.lower()
    if path.suffix.lower() in CSV_DELIMITERS:
        return "csv"
    if name.endswith(JSON_LINES):
        return "lines"
    if name.endswith(".json"):
        return "array" if is_array(path) else "lines"
    raise ConfigError(f"{path}: unknown type of file; expected {', '.join(RECORD_PATTERNS)}")


def _array_chunks(files: list[Path], most: int) -> Iterator[Chunk]:
    first, before = 0, 0
    for path, name in zip(files, file_names(files), strict=True):
        items: list[bytes] = []
        start, done = 1, 0
        for item, done in array_items(path):
            items.append(item)
            if len(items) == most:
                yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + done)
                first, start, items = first + len(items), start + len(items), []
        if items:
            yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + done)
            first += len(items)
        before += path.stat().st_size


def _csv_chunks(files: list[Path], most: int) -> Iterator[Chunk]:
    """Rows as dictionaries; a row with too few or too many cells is skipped by name. Names count rows from 1, after
    the header."""
    csv.field_size_limit(MAX_CELL)
    first, before = 0, 0
    for path, name in zip(files, file_names(files), strict=True):
        # bytes that are not UTF-8 become lone surrogates, which the sample check then rejects by name
        with (
            open(path, "rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            # an open quote would swallow rows
            rows = csv.reader(file, delimiter=CSV_DELIMITERS[path.suffix.lower()], strict=True)
            try:
                header = next(rows, None)
                if not header:
                    raise DataError(f"{path} is empty: expected a header line with the names of the columns")
                items: list[Any] = []
                start = 1
                for row in rows:
                    if not row:
                        continue
                    wrong = f"{len(row)} cells for the {len(header)} columns {', '.join(header[:8])}"
                    items.append(
                        dict(zip(header, row, strict=True)) if len(row) == len(header) else Skip("bad_record", wrong)
                    )
                    if len(items) == most:
                        yield Chunk(
                            first=first, count=len(items), payload=(name, start, items), done=before + raw.tell()
                        )
                        first, start, items = first + len(items), start + len(items), []
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {rows.line_num}: {error}; correct the line (an unclosed quote?)"
                ) from None
            if items:
                yield Chunk(
                    first=first, count=len(items), payload=(name, start, items), done=before + path.stat().st_size
                )
                first += len(items)
        before += path.stat().st_size

"""Records in JSONL, JSON arrays, CSV and TSV: LLaVA/ShareGPT dialogues, image-text pairs, and text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jp_train.data.tools.importers.entries import CHUNK_ENTRIES, CHUNK_LINES, Chunk, Entry, Listing, Reader, Skip
from jp_train.data.tools.importers.files import (
    array_items,
    file_names,
    identity_of,
    is_array,
    line_chunks,
    open_text,
    parse_json,
    source_files,
    total_bytes,
)
from jp_train.data.tools.importers.records import Columns, record_entry
from jp_train.errors import ConfigError, DataError
from jp_train.types import Kind

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_CELL = 64 << 20


@dataclass(frozen=True, kw_only=True)
class RecordReader(Reader):
    """A file of records, or several of one type: `.jsonl`/`.ndjson` (also `.gz`), `.json` (an array, or a record a line), `.csv`/`.tsv` with a
    header line."""

    format: str = "pairs"  # type: ignore[misc]
    source: Path
    images: Path | None
    kind: Kind
    columns: Columns = field(default_factory=Columns)

    def options(self) -> dict[str, Any]:
        return {"columns": asdict(self.columns), "images": None if self.images is None else str(self.images.absolute())}

    def listing(self) -> Listing:
        files = source_files(self.source, [f"*{suffix}" for suffix in (*JSON_LINES, ".json", *CSV_DELIMITERS)], "records")
        types = {_type(path) for path in files}
        if len(types) > 1:
            raise ConfigError(
                f"SOURCE {self.source} mixes {' and '.join(sorted(types))} files; name one type with a glob, for example '{self.source}/*.jsonl'"
            )
        chunks = {"csv": _csv_chunks, "array": _array_chunks, "lines": line_chunks}[types.pop()]
        most = CHUNK_LINES if self.kind is Kind.TEXT else CHUNK_ENTRIES
        return Listing(identity=identity_of(files), total=total_bytes(files), chunks=lambda: chunks(files, most))

    def entries(self, chunk: Chunk, *, pictures: bool = True) -> Iterator[Entry]:
        file, start, payload = chunk.payload
        for place, item in enumerate(payload):
            number, name = chunk.first + place, f"{file}:{start + place}"
            if isinstance(item, bytes):
                if not item.strip():
                    continue
                try:
                    item = parse_json(item)
                except UnicodeDecodeError as error:
                    yield Entry(number=number, name=name, skip=Skip("not_unicode", f"the line is not UTF-8: {error}"))
                    continue
                except ValueError as error:
                    yield Entry(number=number, name=name, skip=Skip("bad_record", f"the line is no JSON: {error}"))
                    continue
            elif isinstance(item, Skip):
                yield Entry(number=number, name=name, skip=item)
                continue
            yield record_entry(item, number, name, self.columns, self.kind)


def _type(path: Path) -> str:
    name = path.name.lower()
    if path.suffix.lower() in CSV_DELIMITERS:
        return "csv"
    if name.endswith(JSON_LINES):
        return "lines"
    if name.endswith(".json"):
        return "array" if is_array(path) else "lines"
    raise ConfigError(f"{path}: unknown type of file; expected {', '.join((*JSON_LINES, '.json', *CSV_DELIMITERS))}")


def _array_chunks(files: list[Path], most: int) -> Iterator[Chunk]:
    first, before = 0, 0
    for path, name in zip(files, file_names(files), strict=True):
        items: list[Any] = []
        start, done = 1, 0
        for item, done in array_items(path):
            items.append(Skip("bad_record", "null instead of an object") if item is None else item)
            if len(items) == most:
                yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + done)
                first, start, items = first + len(items), start + len(items), []
        if items:
            yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + done)
            first += len(items)
        before += path.stat().st_size


def _csv_chunks(files: list[Path], most: int) -> Iterator[Chunk]:
    """Rows as dictionaries; a row with too few or too many cells is skipped by name. Names count rows from 1, after the header."""
    csv.field_size_limit(MAX_CELL)
    first, before = 0, 0
    for path, name in zip(files, file_names(files), strict=True):
        with open_text(path) as file:
            rows = csv.reader(file, delimiter=CSV_DELIMITERS[path.suffix.lower()])
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
                    items.append(dict(zip(header, row, strict=True)) if len(row) == len(header) else Skip("bad_record", wrong))
                    if len(items) == most:
                        yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + file.buffer.tell())
                        first, start, items = first + len(items), start + len(items), []
            except csv.Error as error:
                raise DataError(f"{path}, line {rows.line_num}: {error}; mend the line (an unclosed quote?)") from None
            if items:
                yield Chunk(first=first, count=len(items), payload=(name, start, items), done=before + path.stat().st_size)
                first += len(items)
        before += path.stat().st_size

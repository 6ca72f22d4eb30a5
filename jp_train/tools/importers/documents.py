"""Text: plain text files, of which a file, a paragraph or a line is a document, or records (`records.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.data.samples import MAX_TEXT_BYTES
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.compression import DAMAGE, plain_file
from jp_train.tools.importers.contents import Form, contents_of, not_text, taken_as
from jp_train.tools.importers.entries import CHUNK_ENTRIES, Chunk, Entry, Listing, Reader, Skip
from jp_train.tools.importers.files import file_names, identity_of, line_chunks, total_bytes
from jp_train.tools.importers.records import Columns, RecordReader
from jp_train.tools.importers.sources import TEXT_FILES, other_files, source_files
from jp_train.types import Kind


@dataclass(frozen=True, kw_only=True)
class DocumentReader(Reader):
    """Text files, in the order of their names. `document`: `file`, `paragraph` (separated by blank lines) or `line`."""

    format = "text"
    source: Path
    document: str = "file"
    kind: Kind = Kind.TEXT
    images: None = None

    def options(self) -> dict[str, Any]:
        return {"document": self.document}

    def listing(self) -> Listing:
        files, left_out = source_files(self.source, TEXT_FILES, "text files")
        contents = [contents_of(path) for path in files]
        bad = [(path, each.problem) for path, each in zip(files, contents, strict=True) if each.form is Form.other]
        if bad and (self.document != "file" or len(bad) == len(files)):
            good = [path for path, each in zip(files, contents, strict=True) if each.form is not Form.other]
            raise ConfigError(f"{bad[0][0]} is {bad[0][1]}; expected text in UTF-8{other_files(self.source, good)}")
        chunks = {"file": _file_chunks, "paragraph": _paragraph_chunks, "line": line_chunks}[self.document]
        return Listing(
            identity=identity_of(files),
            total=total_bytes(files),
            chunks=lambda: chunks(files),
            remarks=(f"{taken_as(contents)}: a {self.document} is a document (--document)",),
            left_out=left_out,
        )

    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        for number, (name, slug, content) in enumerate(_named(*chunk.payload), chunk.first):
            try:
                data = content if isinstance(content, bytes) else _read(content)
                text = data.decode("utf-8-sig").strip()
                if "\0" in text:
                    raise Skip("binary", f"the document is binary data (a NUL byte at byte {data.index(0):,})")
            except UnicodeDecodeError as error:
                yield Entry(number=number, name=name, skip=Skip("not_unicode", f"the document is not UTF-8: {error}"))
                continue
            except Skip as skip:
                yield Entry(number=number, name=name, skip=skip)
                continue
            if text or self.document == "file":
                yield Entry(number=number, name=name, note={"text": text, "source_id": name}, slug=slug)


def text_reader(source: Path, document: str, columns: Columns) -> Reader:
    """Records or plain text, by the files' content. Raises ConfigError when a source has both, or nothing."""
    files, _ = source_files(source, TEXT_FILES, "records or plain text")
    contents = [(path, contents_of(path).form) for path in files]
    plain = [path for path, form in contents if form is Form.text]
    records = [path for path, form in contents if form in (Form.lines, Form.array, Form.csv)]
    if records and plain:
        raise ConfigError(
            f"SOURCE {source} has records ({records[0].name}) and plain text ({plain[0].name})"
            f"{other_files(source, max(records, plain, key=len), 'name one sort with a glob')}"
        )
    if records:
        return RecordReader(format="text", source=source, images=None, kind=Kind.TEXT, columns=columns)
    return DocumentReader(source=source, document=document)


def _named(file: str, start: int, items: list[Any]) -> Iterator[tuple[str, str, bytes | Path]]:
    """(name, slug, bytes or the file that holds them) of every document of a chunk: lines are bare bytes, files and
    paragraphs have names."""
    for place, item in enumerate(items):
        if isinstance(item, bytes):
            yield f"{file}:{start + place}", "", item
        else:
            name, content = item
            yield name, name.partition(":")[0], content


def _read(path: Path) -> bytes:
    try:
        with plain_file(path) as (_, stream):
            data = stream.read(MAX_TEXT_BYTES + 1)
    except DAMAGE as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if problem := contents_of(path).problem:
        binary = "binary" if not_text(data[:512]) else "bad_record"
        raise Skip("not_unicode" if problem.startswith("UTF") else binary, f"the document is {problem}")
    if len(data) > MAX_TEXT_BYTES:
        raise Skip(
            "bad_record",
            f"a document of more than {MAX_TEXT_BYTES >> 20} MiB; split it with --document paragraph or line",
        )
    return data


def _file_chunks(files: list[Path]) -> Iterator[Chunk]:
    names, first, done = file_names(files), 0, 0
    for start in range(0, len(files), CHUNK_ENTRIES):
        part = files[start : start + CHUNK_ENTRIES]
        done += total_bytes(part)
        payload = ("", 0, list(zip(names[start : start + CHUNK_ENTRIES], part, strict=True)))
        yield Chunk(first=first, count=len(part), payload=payload, done=done)
        first += len(part)


def _paragraph_chunks(files: list[Path]) -> Iterator[Chunk]:
    """Paragraphs as (name of file and first line, bytes), also those that continue in the next chunk of lines."""
    paragraph: list[bytes] = []
    where, items, first, done, held = ("", 0), [], 0, 0, 0

    def close() -> None:
        nonlocal paragraph
        if paragraph:
            items.append((f"{where[0]}:{where[1]}", b"".join(paragraph)))
            paragraph = []

    for chunk in line_chunks(files):
        file, start, lines = chunk.payload
        if file != where[0]:
            close()
        for place, line in enumerate(lines):
            if not line.strip():
                close()
                continue
            if not paragraph:
                where, held = (file, start + place), 0
            paragraph.append(line)
            held += len(line)
            if held > MAX_TEXT_BYTES:
                raise DataError(
                    f"{file}, line {where[1]}: a paragraph of more than {MAX_TEXT_BYTES >> 20} MiB; use --document line"
                )
        done = chunk.done
        if len(items) >= CHUNK_ENTRIES:
            yield Chunk(first=first, count=len(items), payload=("", 0, items), done=done)
            first, items = first + len(items), []
    close()
    if items:
        yield Chunk(first=first, count=len(items), payload=("", 0, items), done=done)

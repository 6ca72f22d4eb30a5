"""Files of a source: short names, an identity that changes with their content, JSON and lines as streams.

Nothing here holds a whole file in memory: a listing of 10M lines takes as much as one chunk.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.compression import DAMAGE, plain_file
from jp_train.tools.importers.entries import CHUNK_BYTES, CHUNK_LINES, Chunk

HASHED_WHOLE = 1 << 30
"""A listing file up to this many bytes is identified by the SHA-256 of all of it; a larger one by its size, mtime,
first and last MiB."""
MAX_LINE = 64 << 20
"""Bytes of a line at most; a longer one means that the file does not consist of lines."""

_BUFFER = 1 << 20
_OF_NUMBERS = "+-.eE0123456789"


def refuse_output_in_source(source: Path, out: Path) -> None:
    """Raises ConfigError when the folder `out` lies within SOURCE: a second run would read the reports of the first as
    data."""
    if source.is_file():
        return
    out, text = out.resolve(), str(source)
    if source.is_dir() or "**" in text:
        inside = out.is_relative_to(Path(text.partition("**")[0]).resolve())
    else:
        inside = any(Path(path).parent.resolve() == out for path in glob.iglob(text))
    if inside:
        raise ConfigError(
            f"{out} lies within SOURCE {source}: the reports written there would be read as data; "
            "choose a folder outside"
        )


def file_names(files: list[Path]) -> list[str]:
    """A short name for each file that stays the same when the source's folder moves."""
    base = os.path.commonpath([path.parent.absolute() for path in files])
    return [os.path.relpath(path.absolute(), base) for path in files]


def file_identity(path: Path) -> str:
    """A text that changes with the file's content. Raises DataError when it cannot be read."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            if size <= HASHED_WHOLE:
                while block := file.read(_BUFFER):
                    digest.update(block)
                return f"{size:,} bytes, sha256 {digest.hexdigest()}"
            digest.update(file.read(_BUFFER))
            file.seek(size - _BUFFER)
            digest.update(file.read(_BUFFER))
        return f"{size:,} bytes, mtime {path.stat().st_mtime_ns} ns, sha256 of both ends {digest.hexdigest()}"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def identity_of(files: list[Path]) -> dict[str, str]:
    """`file_identity` of each file under its short name."""
    return {name: file_identity(path) for name, path in zip(file_names(files), files, strict=True)}


def total_bytes(files: list[Path]) -> int:
    """Bytes on disk of the files: the length of a listing that is read as a stream."""
    return sum(path.stat().st_size for path in files)


def line_chunks(files: list[Path], most: int = CHUNK_LINES) -> Iterator[Chunk]:
    """Lines of JSONL or text files, decompressed, as chunks of up to `most`: payload = (short file name,
    number of the first line from 1, lines as bytes). Every line is an entry number, blank ones too, so that line n of
    the first file is always entry n - 1.

    Raises:
        DataError: for a file that cannot be read or decompressed, or a line past MAX_LINE.
    """
    first, before = 0, 0
    for path, name in zip(files, file_names(files), strict=True):
        with plain_file(path) as (raw, stream):
            lines: list[bytes] = []
            size, start = 0, 1
            try:
                while line := stream.readline(MAX_LINE):
                    if len(line) == MAX_LINE:
                        raise DataError(
                            f"{path}, line {start + len(lines)} is longer than {MAX_LINE >> 20} MiB: "
                            "expected one record a line"
                        )
                    lines.append(line)
                    size += len(line)
                    if len(lines) == most or size >= CHUNK_BYTES:
                        yield Chunk(
                            first=first, count=len(lines), payload=(name, start, lines), done=before + raw.tell()
                        )
                        first, start = first + len(lines), start + len(lines)
                        lines, size = [], 0
            except DAMAGE as error:
                raise DataError(f"cannot read {path} after line {start + len(lines) - 1}: {error}") from error
            if lines:
                yield Chunk(first=first, count=len(lines), payload=(name, start, lines), done=before + raw.tell())
                first += len(lines)
        before += path.stat().st_size


def parse_json(data: bytes) -> Any:
    """JSON of one line. Raises ValueError with what is wrong."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def array_items(path: Path) -> Iterator[tuple[bytes, int]]:
    """The items of a JSON file that is one array, as a stream: (the JSON of an item, bytes read so far).

    Raises:
        DataError: for broken JSON, with the number of the item.
    """
    # only where an item ends matters here, so no number can be too long
    decoder = json.JSONDecoder(parse_int=len, parse_float=len)
    with plain_file(path) as (raw, stream), io.TextIOWrapper(stream, encoding="utf-8-sig") as file:
        text, at, number, ended, size = "", 0, 0, False, _BUFFER

        def refill() -> bool:
            nonlocal text, at, ended, size
            try:
                more = file.read(size)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 after item {number}: {error}") from None
            except DAMAGE as error:
                raise DataError(f"cannot read {path} after item {number}: {error}") from error
            text, at, ended = text[at:] + more, 0, not more
            return not ended

        def skip_space() -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text) or not refill():
                    return text[at : at + 1]

        if skip_space() != "[":
            raise DataError(f"{path} is no JSON array: expected '[' first, found {text[at : at + 20]!r}")
        at += 1
        while (mark := skip_space()) != "]":
            if number:
                if mark != ",":
                    raise DataError(
                        f"{path}: expected ',' or ']' after item {number}, found {text[at : at + 20]!r} "
                        "(a truncated file?)"
                    )
                at += 1
                skip_space()
            size = _BUFFER
            while True:
                try:
                    _, end = decoder.raw_decode(text, at)
                    # a number may go on in the next block
                    if ended or (end < len(text) and text[end] not in _OF_NUMBERS):
                        break
                except (json.JSONDecodeError, RecursionError) as error:
                    if ended or isinstance(error, RecursionError):
                        raise DataError(
                            f"{path}: item {number + 1} of the array is broken JSON: {error} (a truncated file?)"
                        ) from None
                size *= 2  # so that one huge item is not parsed over and over
                refill()
            item, at = text[at:end].encode(), end
            number += 1
            yield item, raw.tell()
        at += 1
        if skip_space():
            raise DataError(f"{path} goes on after the end of its array: {text[at : at + 20]!r}")

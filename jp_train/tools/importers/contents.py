"""What a file of a source holds. JSON is known by its content, whatever the name; CSV and TSV by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from jp_train.errors import DataError
from jp_train.files import known_format, stand_in
from jp_train.tools.importers.compression import DAMAGE, ENDINGS, plain_file
from jp_train.tools.importers.files import MAX_LINE, array_items, parse_json
from jp_train.tools.importers.images import image_extension

JSON_LINES, JSON, CSV = (".jsonl", ".ndjson", ".jl", ".jsonlines"), (".json",), {".csv": ",", ".tsv": "\t"}
RECORDS = (*JSON_LINES, *JSON, *CSV)
PLAIN_TEXT = (".txt", ".md")
"""Endings, below those of a compression or a number: `a.JSONL.gz.1` is `.jsonl`."""

_HEAD = 4096
_SPACE = b"\xef\xbb\xbf \t\r\n"
_WIDE = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


class Form(str, Enum):
    """What a file holds; `nothing`: it is empty, and goes with any other."""

    lines = "JSON lines"
    array = "JSON array"
    csv = "CSV or TSV"
    text = "plain text"
    nothing = "empty"
    other = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The form of a file, whether its content or only its name told, and of `other` what it is instead, with what to
    do."""

    form: Form
    by_content: bool = True
    problem: str = ""


def name_ending(name: str) -> str:
    """The ending that tells what a file holds, in lower case: `a.JSONL.gz.1` has `.jsonl`, `part-00000` none."""
    stem = name.lower()
    while True:
        stem, ending = os.path.splitext(stem)
        if ending not in ENDINGS and not ending[1:].isdigit():
            return ending


def contents_of(path: Path) -> Contents:
    """What a file holds.

    Raises:
        DataError: when it cannot be read or decompressed.
        ConfigError: for zstd without zstandard.
    """
    ending = name_ending(path.name)
    try:
        with plain_file(path) as (_, stream):
            head = stream.read(_HEAD)
        if not head.strip(_SPACE):
            return Contents(form=Form.csv, by_content=False) if ending in CSV else Contents(form=Form.nothing)
        if problem := not_text(head):
            return Contents(form=Form.other, problem=problem)
        if _is_lines(path, head):
            return Contents(form=Form.lines)
        if ending in RECORDS and (what := stand_in(head)):
            return Contents(form=Form.other, problem=what.removeprefix("is "))
        if ending in JSON and head.lstrip(_SPACE).partition(b"\n")[0].strip() == b"{":
            what = "one JSON object over several lines: write its records as a list, or each on a line of its own"
            return Contents(form=Form.other, problem=what)
        if ending not in JSON_LINES and _is_array(path, head, named=ending in JSON):
            return Contents(form=Form.array)
    except DAMAGE as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if ending in RECORDS:
        return Contents(form=Form.csv if ending in CSV else Form.lines, by_content=False)
    return Contents(form=Form.text)


def not_text(head: bytes) -> str:
    """What a file that starts with `head` is instead of text in UTF-8, with what to do; empty for text."""
    if what := known_format(head):
        return what
    if wide := next((name for magic, name in _WIDE if head.startswith(magic)), ""):
        return f"{wide}: write it as UTF-8 (iconv -f {wide} -t UTF-8)"
    if head.startswith(b"version https://git-lfs"):
        return stand_in(head).removeprefix("is ")
    if extension := image_extension(head):
        return f"an image ({extension})"
    return f"binary data (a NUL byte at byte {head.index(0)})" if b"\0" in head else ""


def taken_as(contents: Iterable[Contents]) -> str:
    """`12 files as JSON lines (by content), 1 file as CSV or TSV (by name)`."""
    counts = Counter((each.form, each.by_content) for each in contents)
    return ", ".join(
        f"{count:,} file{'s' * (count > 1)} as {form.value} (by {'content' if by_content else 'name'})"
        for (form, by_content), count in counts.items()
        if form is not Form.nothing
    )


def _is_lines(path: Path, head: bytes) -> bool:
    """Whether the first two lines that are not blank (or the only one) are JSON objects."""
    if not head.lstrip(_SPACE).startswith(b"{"):
        return False
    objects = 0
    with plain_file(path) as (_, stream):
        while objects < 2 and (line := stream.readline(MAX_LINE)):
            if not line.strip(_SPACE):
                continue
            try:
                if not isinstance(parse_json(line), dict):
                    return False
            except ValueError:
                return False
            objects += 1
    return True


def _is_array(path: Path, head: bytes, *, named: bool) -> bool:
    """Whether a file is an array: `named` so and starting with a bracket, or one whose first item is an object."""
    start = head.lstrip(_SPACE)
    if named or not start.startswith(b"[") or not start[1:].lstrip(_SPACE).startswith(b"{"):
        return named and start.startswith(b"[")
    try:
        return isinstance(parse_json(next(array_items(path))[0]), dict)
    except DataError:
        return False

"""Records in JSON lines, JSON arrays, CSV and TSV: LLaVA/ShareGPT conversations, image-text pairs, and text.

`record_entry` and `Columns` say what a record means, whatever file it is from; `RecordReader` finds records in files.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jp_train.data.dialogue import IMAGE_PARTS, content_of
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.tools.importers.compression import DAMAGE, plain_file
from jp_train.tools.importers.contents import CSV, Form, contents_of, name_ending, taken_as
from jp_train.tools.importers.entries import CHUNK_ENTRIES, CHUNK_LINES, Chunk, Entry, Listing, Reader, Skip
from jp_train.tools.importers.files import array_items, file_names, identity_of, line_chunks, parse_json, total_bytes
from jp_train.tools.importers.media import unread_media
from jp_train.tools.importers.sources import RECORD_FILES, TEXT_FILES, other_files, source_files
from jp_train.types import Kind

IMAGE, IMAGES = "image", "images"
"""Where images are looked for, unless a column is named."""
IMAGE_FILES = ("*.jpg", "*.jpeg", "*.png", "*.webp", "*.gif", "*.bmp", "*.tif", "*.tiff")
"""Files beside the records that records name: they are not left out."""
MAX_CELL = 64 << 20
_CAPTION = "--caption-column"
IMAGE_MARKER_PREFIX = "<image>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of a record hold what.

    `conversations` may also be `messages`, or `texts` beside images; images may also be in `images`, where `image` is
    not named otherwise. Text sources read `conversations` where a record has it, else `text`. Understanding sources
    read `conversations`, else `question` + `caption` (where `question` is named), else `caption`. Generation sources
    read `caption`.
    """

    image: str = IMAGE
    caption: str = "caption"
    question: str | None = None
    text: str = "text"
    conversations: str = "conversations"
    id: str = "id"

    def used(self, kind: Kind) -> list[str]:
        """Columns that an import of `kind` may read."""
        conversations = [*self.of_conversations(kind), "system"]
        if kind is Kind.TEXT:
            return list(dict.fromkeys([self.text, *conversations, self.id]))
        images = [self.image, *([IMAGES] if self.reads_images else []), self.caption]
        if kind is Kind.GENERATION:
            return list(dict.fromkeys([*images, self.id]))
        question = [self.question] if self.question else []
        return list(dict.fromkeys([*images, *question, *conversations, self.id]))

    def of_conversations(self, kind: Kind) -> list[str]:
        """Columns that may have the conversation, the first that there is."""
        return list(dict.fromkeys([self.conversations, "messages", *(["texts"] if kind is Kind.UNDERSTANDING else [])]))

    @property
    def reads_images(self) -> bool:
        """Whether images may also be in `images`."""
        return self.image == IMAGE


def record_entry(record: Any, number: int, name: str, columns: Columns, kind: Kind) -> Entry:
    """The entry of a record; a fault of the record becomes the entry's `skip`."""
    try:
        if not isinstance(record, Mapping):
            raise Skip("bad_record", f"a {type(record).__name__} instead of an object with named values")
        conversations = None if kind is Kind.GENERATION else _conversations(record, columns, kind)
        images = () if kind is Kind.TEXT else _images(record, columns, conversations)
        if kind is Kind.GENERATION and len(images) > 1:
            raise Skip("multi_image", f'"{columns.image}" lists {len(images)} images; a generation sample has one')
        note = {**_note(record, columns, kind, conversations, len(images)), "source_id": name}
        slug = record.get(columns.id)
        slug = str(slug) if isinstance(slug, (str, int)) else ""
        if not images and (kind is not Kind.TEXT or conversations is not None):
            _refuse_unread(record, conversations and note["conversations"], columns, kind)
        if kind is Kind.TEXT:
            return Entry(number=number, name=name, note=note, slug=slug)
        if not images and conversations is not None:
            return Entry(number=number, name=name, note=note, slug=slug, text_only=True)
        if not images:
            raise Skip("no_image", f'"{columns.image}" is empty; the record has {_names(record)}')
        return Entry(number=number, name=name, note=note, images=images, slug=slug)
    except SkipSample as skip:
        return Entry(number=number, name=name, skip=Skip(skip.fault, str(skip)))


def _refuse_unread(record: Mapping[str, Any], turns: Any, columns: Columns, kind: Kind) -> None:
    """Raises Skip for a record without an image that is read, which is about one, a video or sound nevertheless."""
    if kind is Kind.TEXT:
        remedy = "`import conversations --image-column {}` takes it"
    elif isinstance(image := record.get(columns.image), Mapping) and any(image.values()):
        remedy = 'it has none of "bytes", "path", "file_name" and "url"'
    else:
        remedy = f'images come from "{columns.image}"; name another column with --image-column {{}}'
    others = [column for column in columns.used(kind) if column not in (columns.image, IMAGES)]
    if what := unread_media(record, others, turns, remedy):
        raise Skip("unread_media", what)


def _conversations(record: Mapping[str, Any], columns: Columns, kind: Kind) -> Any:
    names = columns.of_conversations(kind)
    return next((record[name] for name in names if record.get(name) is not None), None)


def _note(record: Mapping[str, Any], columns: Columns, kind: Kind, conversations: Any, images: int) -> dict[str, Any]:
    if conversations is not None:
        system = {} if record.get("system") is None else {"system": record["system"]}
        return {"conversations": _turns(conversations)} | system
    if kind is Kind.TEXT:
        return {"text": _value(record, columns.text, "--text-column")}
    if columns.question is not None and kind is Kind.UNDERSTANDING:
        question, answer = (
            _value(record, columns.question, "--question-column"),
            _value(record, columns.caption, _CAPTION),
        )
        return {
            "conversations": [
                {"from": "human", "value": IMAGE_MARKER_PREFIX * images + question},
                {"from": "gpt", "value": answer},
            ]
        }
    caption = record.get(columns.caption)
    if isinstance(caption, list) and caption and all(isinstance(text, str) for text in caption):
        return {"caption": caption}
    return {"caption": _value(record, columns.caption, _CAPTION)}


def _turns(conversations: Any) -> Any:
    """Messages of `role` and `content` as `from` and `value`, parts of content as text; anything else is left to the
    sample check."""
    if not isinstance(conversations, list):
        return conversations
    return [
        {"from": turn.get("from", turn.get("role")), "value": content_of(turn, number)}
        if isinstance(turn, dict) and (("role" in turn and "from" not in turn) or _parts(turn))
        else turn
        for number, turn in enumerate(conversations, start=1)
    ]


def _parts(message: Any) -> list[Any]:
    """The parts of a message's content, where it has some."""
    content = (message.get("content") or message.get("value")) if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else []


def _value(record: Mapping[str, Any], column: str, option: str) -> str:
    if column not in record:
        message = f'no "{column}"; the record has {_names(record)}; {option} names another column'
        raise Skip("bad_record", message)
    value = record[column]
    if not isinstance(value, str):
        raise Skip("bad_record", f'"{column}" is a {type(value).__name__}, expected text')
    return value


def _images(record: Mapping[str, Any], columns: Columns, conversations: Any) -> tuple[str | bytes, ...]:
    """The images of a record, in order: of its column, else those that the parts of its messages hold."""
    column = columns.image
    images = _listed(record, column)
    if columns.reads_images and (others := _listed(record, IMAGES)):
        if images:
            raise Skip("multi_image", f'both "{column}" and "{IMAGES}" have images; name one with --image-column')
        images, column = others, IMAGES
    if not images and isinstance(conversations, list):
        parts = [part for message in conversations for part in _parts(message) if isinstance(part, Mapping)]
        of_parts = [part.get("image") or part.get("image_url") for part in parts if part.get("type") in IMAGE_PARTS]
        images = [_image(image, "content") for image in of_parts if image]
    return tuple(images)


def _listed(record: Mapping[str, Any], column: str) -> list[str | bytes]:
    value = record.get(column)
    images = value if isinstance(value, list) else [value]
    return [image for item in images if (image := _image(item, column))]


def _image(image: Any, column: str) -> str | bytes:
    """A path, or the bytes of an image; empty for none."""
    if isinstance(image, Mapping):  # the Image feature of Hugging Face datasets, and its like
        image = next((image[name] for name in _IMAGE_KEYS if image.get(name) is not None), None)
    if image is None:
        return ""
    if not isinstance(image, (str, bytes)):
        raise Skip("bad_record", f'"{column}" is a {type(image).__name__}, expected a path or the bytes of an image')
    if isinstance(image, bytes) or not (text := _BASE64.match(image)):
        return image
    try:
        return base64.b64decode("".join(image[max(0, text.end("head")) :].split()), validate=True)
    except ValueError as error:
        raise Skip("image_undecodable", f'"{column}" is {image[:30]!r}…, no base64: {error}') from None


_IMAGE_KEYS = ("bytes", "path", "file_name", "url")
_BASE64 = re.compile(r"(?P<head>data:[^,]*;base64,)|(?P<bare>/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/\s]{60}")
"""A data URI, or base64 that begins as a JPEG, PNG, WebP or GIF does and is longer than a path."""


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in list(record)[:8]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class RecordReader(Reader):
    """A file of records, or several of one form: a JSON record a line, a JSON array, or CSV or TSV with a header line;
    plain or compressed."""

    format: str = "pairs"
    source: Path
    images: Path | None
    kind: Kind
    columns: Columns = field(default_factory=Columns)

    def options(self) -> dict[str, Any]:
        return {"columns": asdict(self.columns), "images": None if self.images is None else str(self.images.absolute())}

    def listing(self) -> Listing:
        files, left_out = source_files(self.source, TEXT_FILES if self.kind is Kind.TEXT else RECORD_FILES, "records")
        contents = {path: contents_of(path) for path in files}
        forms: dict[Form, list[Path]] = {}
        for path, each in contents.items():
            forms.setdefault(each.form, []).append(path)
        forms.pop(Form.nothing, None)
        for path, each in contents.items():
            if each.form in (Form.text, Form.other):
                good = [*forms.get(Form.lines, ()), *forms.get(Form.array, ()), *forms.get(Form.csv, ())]
                raise ConfigError(
                    f"{path} is {each.problem or 'plain text'}; expected JSON lines or a JSON array, whatever the "
                    "name, or CSV or TSV, which are known by their names (*.csv, *.tsv)"
                    f"{other_files(self.source, good)}"
                )
        if len(forms) > 1:
            mix = " and ".join(f"{form.value} ({paths[0].name})" for form, paths in forms.items())
            most_common = max(forms.values(), key=len)
            raise ConfigError(
                f"SOURCE {self.source} mixes {mix}{other_files(self.source, most_common, 'name one form with a glob')}"
            )
        chunks = {Form.csv: _csv_chunks, Form.array: _array_chunks}.get(next(iter(forms), Form.lines), line_chunks)
        most = CHUNK_LINES if self.kind is Kind.TEXT else CHUNK_ENTRIES
        if self.images is not None:
            left_out = {label: count for label, count in left_out.items() if label not in IMAGE_FILES}
        return Listing(
            identity=identity_of(files),
            total=total_bytes(files),
            chunks=lambda: chunks(files, most),
            remarks=(taken_as(contents.values()),),
            left_out=left_out,
        )

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
            plain_file(path) as (raw, stream),
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            # an open quote would swallow rows
            rows = csv.reader(file, delimiter=CSV[name_ending(path.name)], strict=True)
            try:
                header = next(rows, None)
                if not header:
                    raise DataError(f"{path} is empty: expected a header line with the names of the columns")
                header = _named_once(header)
                items: list[Any] = []
                start = 1
                for row in rows:
                    if not row:
                        continue
                    items.append(_csv_record(header, row))
                    if len(items) == most:
                        yield Chunk(
                            first=first, count=len(items), payload=(name, start, items), done=before + raw.tell()
                        )
                        first, start, items = first + len(items), start + len(items), []
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {rows.line_num}: {error}; correct the line (an unclosed quote?)"
                ) from None
            except DAMAGE as error:
                raise DataError(f"cannot read {path} after line {rows.line_num}: {error}") from error
            if items:
                yield Chunk(
                    first=first, count=len(items), payload=(name, start, items), done=before + path.stat().st_size
                )
                first += len(items)
        before += path.stat().st_size


def _named_once(header: list[str]) -> list[str]:
    """The names of columns, those that several have numbered: none of these is the column that was meant."""
    counts = Counter(header)
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if counts[name] == 1 else f"{name} ({seen[name]} of {counts[name]})")
    return names


def _csv_record(header: list[str], row: list[str]) -> dict[str, str] | Skip:
    if len(row) != len(header):
        return Skip("bad_record", f"{len(row)} cells for the {len(header)} columns {', '.join(header[:8])}")
    if any("\0" in cell for cell in row):
        return Skip("bad_record", "a NUL byte in a cell: it is no text")
    return dict(zip(header, row, strict=True))

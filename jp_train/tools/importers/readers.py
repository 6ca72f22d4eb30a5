"""The readers of all layouts, and how a source's files choose among them."""

from __future__ import annotations

from pathlib import Path

from jp_train.errors import ConfigError
from jp_train.tools.importers.coco import CocoReader
from jp_train.tools.importers.documents import PATTERNS, DocumentReader
from jp_train.tools.importers.entries import Reader
from jp_train.tools.importers.files import source_files
from jp_train.tools.importers.imagenet import ImageNetReader
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import RECORD_PATTERNS, Columns, RecordReader
from jp_train.types import Kind

__all__ = [
    "CocoReader",
    "Columns",
    "DocumentReader",
    "ImageNetReader",
    "ParquetReader",
    "RecordReader",
    "record_reader",
    "text_reader",
]


def record_reader(name: str, source: Path, images: Path | None, kind: str, columns: Columns) -> RecordReader:
    """A reader of records with pictures; without an image folder, paths start in the source's folder."""
    if images is None:
        images = source if source.is_dir() else source.parent
    return RecordReader(format=name, source=source, images=images, kind=Kind(kind), columns=columns)


def text_reader(source: Path, document: str, columns: Columns) -> Reader:
    """Records or plain text, by the files' names. Raises ConfigError when a source has both, or nothing."""
    files = source_files(source, (*RECORD_PATTERNS, *PATTERNS), "records or plain text")
    records = [path for path in files if any(path.match(pattern) for pattern in RECORD_PATTERNS)]
    plain = [path for path in files if any(path.match(pattern) for pattern in PATTERNS)]
    if records and plain:
        raise ConfigError(
            f"SOURCE {source} has records ({records[0].name}) and plain text ({plain[0].name}): name one sort with a glob"
        )
    if records:
        return RecordReader(format="text", source=source, images=None, kind=Kind.TEXT, columns=columns)
    return DocumentReader(source=source, document=document)

"""Parquet with image bytes (Hugging Face's `{bytes, path}`, or binary) or text. A process reads one row group at a
time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jp_train.errors import ConfigError, DataError
from jp_train.files import other_format_at
from jp_train.tools.importers.contents import name_ending
from jp_train.tools.importers.entries import Chunk, Entry, Listing, Reader
from jp_train.tools.importers.files import file_names
from jp_train.tools.importers.media import is_media
from jp_train.tools.importers.records import IMAGES, Columns, record_entry
from jp_train.tools.importers.sources import source_files
from jp_train.types import Kind

ROWS_AT_A_TIME = 64
"""Rows turned into Python objects at once."""

_UNREAD = b"\0"
"""Placeholder of an image that a dry run does not read."""


@dataclass(frozen=True, kw_only=True)
class ParquetReader(Reader):
    """Parquet files in the order of their names, rows in order. A unit of work is a row group: memory is about 3 row
    groups a process."""

    format = "parquet"
    surveyed = 16  # row groups of perhaps 500 MB each, read with their images
    source: Path
    images: Path | None
    kind: Kind
    columns: Columns = field(default_factory=Columns)

    def options(self) -> dict[str, Any]:
        return {"columns": asdict(self.columns), "images": None if self.images is None else str(self.images.absolute())}

    def listing(self) -> Listing:
        parquet = _pyarrow()
        files, left_out = source_files(self.source, _is_parquet, "Parquet files")
        names = file_names(files)
        identity, groups = {}, []
        for path, name in zip(files, names, strict=True):
            file = _open(parquet, path)
            self._check_columns(path, file.schema_arrow.names)
            meta = file.metadata
            groups += [(path, name, group, meta.row_group(group).num_rows) for group in range(meta.num_row_groups)]
            identity[name] = f"{path.stat().st_size:,} bytes, {meta.num_rows:,} rows, footer sha256 {_footer(path)}"
            file.close()

        def chunks() -> Iterator[Chunk]:
            first, before, last = 0, 0, None
            for path, name, group, rows in groups:
                before = first if name != last else before
                last = name
                yield Chunk(first=first, count=rows, payload=(path, name, group, first - before), done=first + rows)
                first += rows

        return Listing(identity=identity, total=sum(group[-1] for group in groups), chunks=chunks, left_out=left_out)

    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        path, name, group, before = chunk.payload
        file = _open(_pyarrow(), path)
        present = set(file.schema_arrow.names)
        names = self._named(present)
        columns = [column for column in names.used(self.kind) if column in present]
        # a row without an image may be about one that is not read, or a video: `record_entry` refuses it
        columns += [column for column in present - {*columns} if is_media(column)]
        if not image_bytes:
            columns = [column for column in columns if column not in (names.image, IMAGES)]
        place = 0
        try:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                for record in batch.to_pylist():
                    if not image_bytes and self.kind is not Kind.TEXT:
                        record[names.image] = _UNREAD
                    row = f"{name}:{before + place + 1}"
                    yield record_entry(record, chunk.first + place, row, names, self.kind)
                    place += 1
        except Exception as error:  # pyarrow raises OSError, ArrowInvalid and others for damaged pages
            raise DataError(f"{path}, row group {group}: {error}; the file is damaged: download it again") from error
        finally:
            file.close()

    def _named(self, present: Collection[str]) -> Columns:
        """The columns to read, with `images` where there is no `image`."""
        columns = self.columns
        plural = columns.reads_images and columns.image not in present and IMAGES in present
        return replace(columns, image=IMAGES) if plural else columns

    def _check_columns(self, path: Path, present: list[str]) -> None:
        names = self._named(present)
        needed = [] if self.kind is Kind.TEXT else [names.image]
        has_text = [
            column
            for column in names.used(self.kind)
            if column in present and column not in (names.image, IMAGES, "system", names.id)
        ]
        missing = [column for column in needed if column not in present]
        if missing or not has_text:
            lacks = missing or [self.columns.text if self.kind is Kind.TEXT else self.columns.caption]
            raise ConfigError(
                f"{path} has no column {', '.join(map(repr, lacks))}; it has {', '.join(present)}. "
                "Name yours with --image-column, "
                "--caption-column, --text-column or --conversations-column"
                + (
                    "; images behind addresses are to be downloaded first (img2dataset)"
                    * ("url" in map(str.lower, present))
                )
            )


def _is_parquet(path: Path) -> bool:
    """Whether a file of a folder is taken: by its ending, or by its first bytes where it has none."""
    if ending := name_ending(path.name):
        return ending in (".parquet", ".parq", ".pq")
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            "Parquet needs pyarrow, which is not installed: pip install 'jp_train[parquet]' (or pip install pyarrow)"
        ) from None
    return parquet


def _open(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # ArrowInvalid, OSError
        raise DataError(f"{path} {other_format_at(path) or f'is no Parquet file that can be read: {error}'}") from error


def _footer(path: Path) -> str:
    """SHA-256 of the footer: it holds the offsets, sizes and statistics of every column chunk."""
    with open(path, "rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()

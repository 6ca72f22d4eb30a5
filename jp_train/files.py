"""Writing files that a reader, a kill or a full disk may meet at any moment; and the files by which a GPU shows."""

from __future__ import annotations

import codecs
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 24
"""Bytes of a large file written, summed and read at one time."""
MAX_WAITING = 64 << 20
"""Bytes of lines kept while the disk takes none: days of metrics."""
GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Device files of the NVIDIA and the AMD driver."""
LINE_HEADS = ('{"step"', '{"event"', '{"time"')
"""How the lines of a run's own files begin; what comes after a torn half is recognised by them."""


def has_gpu_files() -> bool:
    """Whether this host has a GPU by the driver's device files: importing torch for it takes seconds, and torch says no
    where its build does not fit the driver."""
    return any(path.exists() for path in GPU_FILES)


@contextmanager
def replacing(path: Path, *, durable: bool = True, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends without an error and is removed otherwise.

    A reader sees the old file or the new one. Durable: file and folder are on the disk before this returns, so that
    after a power cut, too, there is no third; without it the file may be lost or empty then (for what is rewritten
    every few seconds). `writer` tells apart those that may replace the same file at the same time. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{writer}.tmp" if writer else f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True, writer: str = "") -> None:
    """Replace `path` by `content` (text as UTF-8), see `replacing`."""
    with replacing(path, durable=durable, writer=writer) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """What was written to a file, or the names in a folder (of new and renamed files), survives a power cut when this
    returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_system_time(folder: Path) -> float:
    """The time that a file of this folder gets now, in seconds since 1970: what the age of another one is counted from,
    as a file server has a clock of its own. This host's time where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".jp-time.") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


class Appender:
    """Lines at the end of a file, each on its way to the disk at once. On a disk that takes none (full, read-only) they
    wait in memory, in order, and go with the next one: what stops a run then is `checkpoint.on_error`, not its log.
    More than MAX_WAITING bytes raise the error."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError:
            if len(self._waiting) > MAX_WAITING:
                raise

    def close(self) -> None:
        self.write("")
        self._file.close()


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines, on the disk when this returns. One that a crash cut short before is ended first; a lone surrogate
    (in a key of a foreign file) is escaped. Raises OSError."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file in order; None for a line that holds none, for the caller to count.

    A run that is killed inside a write leaves half a line, and the resumed run appends to it: the object behind the
    torn half is recovered. Give it an open file: `str.splitlines` would also split at a U+2028 inside a key.
    """
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if (whole := json_object(text)) is not None:
            yield whole
            continue
        yield None
        start = max(text.rfind(head) for head in LINE_HEADS)
        if start > 0 and (recovered := json_object(text[start:])) is not None:
            yield recovered


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`, None where it holds something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def lines_until(path: Path, last_step: int | None) -> list[str]:
    """The whole lines of a metrics file whose step is at most `last_step`; of one step's lines the last."""
    kept: dict[int, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if last_step is not None and step <= last_step:
                kept[step] = line if line.endswith("\n") else line + "\n"
    return list(kept.values())


def drop_later_lines(path: Path, last_step: int) -> None:
    """Take the lines of steps after `last_step` out of a JSON-lines file (a resumed run writes them again); lines
    without a step stay."""
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                step = json.loads(line).get("step")
            except (ValueError, AttributeError):
                continue
            if step is None or step <= last_step:
                kept.append(line if line.endswith("\n") else line + "\n")
    write_atomically(path, "".join(kept))


def stand_in(head: bytes) -> str:
    """What lies in place of a file, told by its first bytes (64 or more): nothing, a Git LFS pointer, or a server's
    answer to a download; ends a sentence that begins with the path. Empty for anything else."""
    text = head.lstrip().lower()
    if not head:
        return "is an empty file: copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder that was cloned"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself: the download was answered by a web page (a login, a proxy)"
    if text.startswith((b"<?xml", b"<error")) or (
        text.startswith(b"{") and text[1:].lstrip().startswith((b'"error', b'"message"', b'"detail"'))
    ):
        answer = " ".join(head[:60].decode(errors="replace").split())
        return f"is a server's answer to a download, not the file itself: {answer}"
    return ""


FORMATS = (
    (0, b"PAR1", "Parquet, which `jp-train data import parquet` reads"),
    (0, b"ARROW1", "Arrow IPC: write it as Parquet, which `jp-train data import parquet` reads"),
    (
        0,
        b"\xff\xff\xff\xff",
        "an Arrow stream, as save_to_disk of Hugging Face datasets writes it: write it as Parquet (to_parquet), which "
        "`jp-train data import parquet` reads",
    ),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document: unpack it, or save it as plain text"),
    (0, b"%PDF-", "a PDF: extract its text first (pdftotext)"),
    (0, b"{\\rtf", "an RTF document: save it as plain text"),
    (257, b"ustar", "a tar archive: unpack it, or import it with `jp-train data import webdataset`"),
)
"""Offset, first bytes and name of formats that a file may have instead of the one that is expected, with what to do."""


def known_format(head: bytes) -> str:
    """Which of FORMATS a file that starts with `head` (262 bytes or more) has, with what to do; empty for none."""
    return next((what for at, magic, what in FORMATS if head.startswith(magic, at)), "")


def text_format(head: bytes) -> str:
    """JSON or other text in UTF-8 by a file's first bytes, with the import that reads it; empty for anything else."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return ""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if b"\0" in head or not start:
        return ""
    if start.startswith((b"{", b"[")):
        return "JSON or JSON lines, which `jp-train data import text`, `pairs`, `conversations` or `coco` reads"
    return "plain text, CSV or TSV, which `jp-train data import text` or `pairs` reads"


def stand_in_at(path: Path) -> str:
    """`stand_in` of a file, for the error after it could not be read as what it should be; empty for no file."""
    return stand_in(_head(path))


def other_format_at(path: Path, *, texts: bool = False) -> str:
    """`stand_in`, or the format that a file has by its first bytes (`is Parquet, which …`), for the same errors; with
    `texts` JSON and plain text are formats too."""
    head = _head(path)
    if what := stand_in(head):
        return what
    name = known_format(head) or (text_format(head) if texts else "")
    return f"is {name}" if name else ""


def _head(path: Path) -> bytes:
    """The first bytes of a file, and of one that cannot be read some that are nothing."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError:
        return b"-"


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, at any depth: JSON has no number for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value

"""Tar shards as random-access files: naming them, reading byte ranges (local or http), and listing their members.

A tar is never extracted and a member's name never becomes a path: names are only keys. An I/O error is retried with exponential
back-off and then stops the run; it is never turned into a skipped sample.
"""

from __future__ import annotations

import glob
import http.client
import io
import os
import stat
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import braceexpand
import numpy as np

from jp_train.errors import ConfigError, DataError

MAX_OPEN_SHARDS = 64
"""File descriptors one reader keeps open."""
HTTP_TIMEOUT_S = 60.0
FIRST_BACK_OFF_S = 0.1

_SCAN_BUFFER = 1 << 20
_BLOCK = 512
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar: absolute path or URL, size in bytes, and a stamp that changes with its content (mtime in ns, or the server's
    ETag)."""

    path: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """The file name alone, for hashes and messages that must not depend on where the data is mounted."""
        return urllib.parse.urlsplit(self.path).path.rsplit("/", 1)[-1] if is_url(self.path) else os.path.basename(self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMembers:
    """The files of a shard, grouped into N samples by key, in tar order.

    `member_start` int64 [N + 1] delimits each sample's members; per member: `extension` int16 (index into `extensions`), `offset`
    and `size` int64, in bytes from the start of the tar. `ignored` lists file names that belong to no sample, with the reason.
    """

    keys: tuple[str, ...]
    member_start: np.ndarray
    extensions: tuple[str, ...]
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    ignored: tuple[tuple[str, str], ...]


def is_url(path: str) -> bool:
    """Whether `path` is read over http(s)."""
    return path.startswith(("http://", "https://"))


def expand_shards(spec: str, root: str | Path = ".") -> list[str]:
    """Absolute paths or URLs of the shards that `spec` names, in order.

    `spec` may use braces (`shard-{000..127}.tar`, `{a,b}.tar`), globs, or name a folder (its `*.tar`, sorted); relative to
    `root`.

    Raises:
        ConfigError: for an unsupported scheme (`pipe:` and cloud schemes) or unbalanced braces.
        DataError: for a file, folder or glob that matches nothing, or a shard that is named twice.
    """
    try:
        parts = list(braceexpand.braceexpand(spec))
    except braceexpand.UnbalancedBracesError as error:
        raise ConfigError(f"shards {spec!r}: {error}; write ranges as {{000..127}} and lists as {{a,b}}") from None
    paths = [path for part in parts for path in _expand_one(part, spec, Path(root))]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"shards {spec!r} name {path} twice; each shard may be listed once in a source")
        seen.add(path)
    return paths


def _expand_one(part: str, spec: str, root: Path) -> list[str]:
    if is_url(part):
        return [part]
    scheme = part.split(":", 1)[0] if ":" in part and not part.startswith("/") else ""
    if scheme == "pipe" or "://" in part:
        raise ConfigError(
            f"shards {spec!r}: the scheme {scheme!r} is not supported (it cannot be read by byte range, and pipe: would run a "
            "command); use a local path or an http(s) URL"
        )
    path = Path(os.path.abspath(root / os.path.expanduser(part)))
    if path.is_dir():
        found = sorted(str(child) for child in path.iterdir() if child.suffix == ".tar")
        if not found:
            raise DataError(f"shards {spec!r}: folder {path} holds no *.tar file")
        return found
    if path.exists():
        return [str(path)]
    if glob.has_magic(part):
        found = sorted(glob.glob(str(path)))
        if not found:
            raise DataError(f"shards {spec!r}: no file matches {path}")
        return found
    raise DataError(f"shards {spec!r}: {path} does not exist (relative paths start at data.root, here {root.absolute()})")


class ShardReader:
    """Byte ranges of shards: os.pread on a bounded set of open files, or http range requests.

    One per process (descriptors are opened by the process that reads). `retries` is the number of tries of one read.
    """

    def __init__(self, retries: int = 4, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._tries = max(1, retries)
        self._sleep = sleep
        self._open: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def stat(self, path: str) -> Shard:
        """Size and stamp of a shard. Raises DataError when it cannot be reached."""
        return self._retry(path, "its size", lambda: _stat_url(path) if is_url(path) else _stat_local(path))

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises DataError when the shard changed, is too short, or cannot be read."""
        what = f"bytes {offset} to {offset + size}"
        if is_url(shard.path):
            return self._retry(shard.path, what, lambda: _read_url(shard, offset, size))
        return self._retry(shard.path, what, lambda: self._read_local(shard, offset, size))

    def close(self) -> None:
        """Close every descriptor this process opened."""
        if self._pid == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open.clear()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple:
        return (ShardReader, (self._tries,))

    def _retry(self, path: str, what: str, action: Callable[[], _Result]) -> _Result:
        wait = FIRST_BACK_OFF_S
        for attempt in range(1, self._tries + 1):
            try:
                return action()
            except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors too
                self._drop(path)
                if attempt == self._tries or _is_final(error):
                    raise DataError(
                        f"shard {path}: cannot read {what} after {attempt} tries: {error}. An I/O error is never skipped: check "
                        "the disk, mount or server, then start again (it resumes); data.io_retries sets the number of tries"
                    ) from error
                self._sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")

    def _read_local(self, shard: Shard, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(shard)
        chunks: list[bytes] = []
        done = 0
        while done < size:
            chunk = os.pread(descriptor, size - done, offset + done)
            if not chunk:
                raise DataError(
                    f"shard {shard.path} ends at byte {offset + done}, inside bytes {offset} to {offset + size} that its index "
                    "names: it was truncated; restore the file and index it again"
                )
            chunks.append(chunk)
            done += len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _descriptor(self, shard: Shard) -> int:
        if self._pid != os.getpid():  # never use a descriptor inherited through fork
            self._open.clear()
            self._pid = os.getpid()
        descriptor = self._open.get(shard.path)
        if descriptor is not None:
            self._open.move_to_end(shard.path)
            return descriptor
        descriptor = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            now = os.fstat(descriptor)
            if (now.st_size, str(now.st_mtime_ns)) != (shard.size, shard.stamp):
                raise DataError(
                    f"shard {shard.path} changed since it was indexed (indexed: {shard.size} bytes, mtime {shard.stamp} ns; now: "
                    f"{now.st_size} bytes, mtime {now.st_mtime_ns} ns); start again so that it is indexed anew"
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._open[shard.path] = descriptor
        while len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _drop(self, path: str) -> None:
        descriptor = self._open.pop(path, None)
        if descriptor is not None and self._pid == os.getpid():
            os.close(descriptor)


def _is_final(error: Exception) -> bool:
    """An answer that will not change by asking again: 4xx except 408 and 429, a missing file or permission."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def _stat_local(path: str) -> Shard:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"shard {path} is not a regular file; give tar files, or a folder that holds them")
    return Shard(path=path, size=found.st_size, stamp=str(found.st_mtime_ns))


def _stat_url(url: str) -> Shard:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HTTP_TIMEOUT_S) as answer:
        length = answer.headers.get("Content-Length")
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if length is None:
        raise DataError(f"shard {url}: the server sends no Content-Length; jp_train needs a server that answers byte-range requests")
    return Shard(path=url, size=int(length), stamp=stamp)


def _read_url(shard: Shard, offset: int, size: int) -> bytes:
    if size == 0:
        return b""
    request = urllib.request.Request(shard.path, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
        if answer.status != 206:
            raise DataError(
                f"shard {shard.path}: the server answered a byte-range request with status {answer.status} instead of 206; "
                "serve the shards from a server with range support, or copy them to a local disk"
            )
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if stamp != shard.stamp:
            raise DataError(
                f"shard {shard.path} changed since it was indexed ({shard.stamp!r} became {stamp!r}); start again to index it anew"
            )
        data = answer.read(size + 1)
    if len(data) != size:
        raise OSError(f"the server sent {len(data)} bytes of {size}")
    return data


class _ShardFile(io.RawIOBase):
    """A seekable read-only file over a ShardReader, for the header scan."""

    def __init__(self, reader: ShardReader, shard: Shard) -> None:
        self._reader, self._shard, self._position = reader, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._shard.size - self._position))
        data = self._reader.read(self._shard, self._position, size) if size else b""
        buffer[:size] = data
        self._position += size
        return size


def scan_members(shard: Shard, reader: ShardReader) -> ShardMembers:
    """List a shard's members from its tar headers alone.

    The key of a member is its name up to the first dot of the file name (the webdataset convention), the rest is its extension.

    Raises:
        DataError: for a compressed, truncated or corrupt tar, links, sparse files, data after the end marker, a key whose
            members are not together, or a field that a sample has twice; it names the byte offset and what to do.
    """
    buffer_size = _SCAN_BUFFER * 4 if is_url(shard.path) else 1 << 16
    with io.BufferedReader(_ShardFile(reader, shard), buffer_size) as file:
        magic = file.read(4)
        if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic == b"\x28\xb5\x2f\xfd" or magic == b"\xfd7zX":
            raise DataError(f"shard {shard.path} is compressed, so byte ranges cannot be read from it; decompress it to a plain .tar")
        file.seek(0)
        return _group(shard, file)


def _group(shard: Shard, file: io.BufferedReader) -> ShardMembers:
    keys: list[str] = []
    seen: dict[str, int] = {}
    start, codes, offsets, sizes = [0], [], [], []
    extensions: dict[str, int] = {}
    ignored: list[tuple[str, str]] = []
    fields_here: set[str] = set()
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every header otherwise
                position = member.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"shard {shard.path}, byte {position}: member {member.name!r} is a link, device or sparse file; "
                        "a shard may hold plain files only: write it again"
                    )
                if member.offset_data + member.size > shard.size:
                    raise tarfile.ReadError(f"member {member.name!r} of {member.size} bytes runs past the end of the file")
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot or not extension:
                    ignored.append((member.name, "the file name has no key or no extension: it belongs to no sample"))
                    continue
                key = f"{folder}/{stem}" if folder else stem
                extension = extension.lower()
                if not keys or keys[-1] != key:
                    if key in seen:
                        raise DataError(
                            f"shard {shard.path}, byte {position}: key {key!r} appears again after other samples (first as sample "
                            f"{seen[key]}); the files of one sample must be adjacent and keys unique: write the shard again"
                        )
                    seen[key] = len(keys)
                    keys.append(key)
                    start.append(start[-1])
                    fields_here.clear()
                if extension in fields_here:
                    raise DataError(
                        f"shard {shard.path}, byte {position}: key {key!r} has two .{extension} files; keys must be unique within a shard"
                    )
                fields_here.add(extension)
                start[-1] += 1
                codes.append(extensions.setdefault(extension, len(extensions)))
                offsets.append(member.offset_data)
                sizes.append(member.size)
            _check_end(shard, file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"shard {shard.path} is corrupt or truncated near byte {position} of {shard.size}: {error}; download or write it "
            "again, or take it out of the source"
        ) from error
    return ShardMembers(
        keys=tuple(keys),
        member_start=np.array(start, np.int64),
        extensions=tuple(extensions),
        extension=np.array(codes, np.int16),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
        ignored=tuple(ignored),
    )


def _check_end(shard: Shard, file: io.BufferedReader, offset: int) -> None:
    """tarfile ends quietly at a header it cannot read: insist on the end marker, and on nothing but zeros after it."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise DataError(
            f"shard {shard.path} ends at byte {shard.size} without the end-of-archive marker: it was truncated while being written "
            "or copied; download or write it again"
        )
    if block.count(0) != _BLOCK:
        raise DataError(
            f"shard {shard.path} is corrupt: the block at byte {offset} is neither a tar header nor the end of the archive; "
            "download or write it again, or take it out of the source"
        )
    while block := file.read(_SCAN_BUFFER):
        if block.count(0) != len(block):
            raise DataError(
                f"shard {shard.path} has data after its end-of-archive marker at byte {offset} (tars joined with cat?); its later "
                "samples would be lost: write it again as one tar"
            )

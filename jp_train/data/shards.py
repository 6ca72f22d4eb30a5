"""Tar shards as random-access files: naming them, reading byte ranges (local or http), and listing their members.

A tar is never extracted and a member's name never becomes a path: names are only keys. An I/O error is retried with
exponential back-off and then stops the run; it is never turned into a skipped sample.
"""

from __future__ import annotations

import glob
import http.client
import json
import os
import re
import stat
import sys
import threading
import time
import urllib.parse
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import braceexpand
import numpy as np

from jp_train.config.schema import DataConfig
from jp_train.data.http_ranges import HttpRanges, HttpStatusError
from jp_train.data.stores import STORES, StoreRanges, scheme_of
from jp_train.data.tar_headers import COMPRESSED, NO_TAR, TarFault, tar_members
from jp_train.data.tar_samples import group_members
from jp_train.errors import ConfigError, DataError
from jp_train.files import other_format_at

MAX_OPEN_SHARDS = 256
"""File descriptors one reader keeps open, of shards and of the ids beside them."""
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 10.0
ANNOUNCED_BACK_OFF_S = 1.0
"""Before the first wait that is longer, one line says what is waited for."""
STAT_TRIES = 4
"""At most, for shards that are looked up or listed: nothing is lost yet, and somebody waits."""

_SCAN_BLOCK = 1 << 16
_SCAN_BLOCK_URL = 4 << 20
_JOIN_GAP = 32 << 10
"""Bytes of other files that a joined request may fetch without need."""
_JOIN_LOCAL = 1 << 16
"""Bytes of a joined read of a local shard, at most."""
_OTHER_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|zstd|lz4|z))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_REWRITE = (
    "Download or write the shard again, or take it out of the source's `shards` (of a folder, move the file away); "
    "`jp-train data verify` says up to which sample it is readable"
)
_REMEDIES = {
    NO_TAR: "Import it first, and name the folder of shards that the import writes",
    COMPRESSED: "Name the plain tars then",
}
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar: absolute path or URL, size in bytes, and a stamp that changes with its content (mtime in ns, or the
    server's ETag). `excluded` is the digest of its samples that `data verify --exclude` took out, empty for none
    (exclusions.py). `index_dir`: where its sidecars are written (`data.index_dir`), empty for beside it."""

    path: str
    size: int
    stamp: str
    excluded: str = ""
    index_dir: str = ""

    @property
    def name(self) -> str:
        """The file name alone, for hashes and messages that must not depend on where the data is mounted."""
        http = is_url(self.path) and not scheme_of(self.path)
        return os.path.basename(urllib.parse.urlsplit(self.path).path if http else self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMembers:
    """The files of a shard, grouped into N samples by key, in tar order.

    `member_start` int64 [N + 1] delimits each sample's members; per member: `extension` int32 (index into
    `extensions`), `offset` and `size` int64, in bytes from the start of the tar. `ignored` lists file names that belong
    to no sample, with the reason.
    """

    keys: tuple[str, ...]
    member_start: np.ndarray
    extensions: tuple[str, ...]
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    ignored: tuple[tuple[str, str], ...]


def is_url(path: str) -> bool:
    """Whether `path` is read from a server (http, https) or a store (s3, gs, az, hf)."""
    return path.startswith(("http://", "https://")) or bool(scheme_of(path))


def expand_shards(spec: str, root: str | Path = ".") -> list[str]:
    """Absolute paths or URLs of the shards that `spec` names, in order.

    `spec` may use braces (`shard-{000..127}.tar`, `{a,b}.tar`), globs, or name a folder (its `*.tar`, sorted); relative
    to `root`. So may URLs of stores, which are listed for it; http URLs only braces.

    Raises:
        ConfigError: for an unsupported scheme (`pipe:`), unbalanced braces, or a store without its package.
        DataError: for a file, folder or glob that matches nothing, a store that cannot be listed, or a shard that is
            named twice.
    """
    try:
        parts = list(braceexpand.braceexpand(spec))
    except ValueError as error:
        raise ConfigError(f"shards {spec!r}: {error}; write ranges as {{000..127}} and lists as {{a,b}}") from None
    paths = [path for part in parts for path in _expand_part(part, spec, Path(root))]
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"shards {spec!r} name {path} twice; each shard may be listed once in a source")
        seen.add(path)
    return paths


def passed_over(spec: str, root: str | Path = ".") -> dict[str, int]:
    """How many tars of the folders that `spec` names are no shards, by the endings that exclude them (`*.tar.gz`,
    `*.TAR`): a folder gives its plain `*.tar`, which byte ranges can be read from."""
    folders = [Path(root) / os.path.expanduser(part) for part in braceexpand.braceexpand(spec) if not is_url(part)]
    names = [name for folder in folders if folder.is_dir() for name in sorted(os.listdir(folder))]
    endings = [_OTHER_TAR.search(name) for name in names if not name.startswith(".")]
    return dict(Counter(f"*{ending[0]}" for ending in endings if ending and ending[0] != ".tar"))


def passed_over_text(counts: Mapping[str, int]) -> str:
    """`1 *.tar.gz passed over: …`, empty where none was."""
    files = ", ".join(f"{count:,} {ending}" for ending, count in counts.items())
    remedy = "a folder gives its *.tar; `jp-train data import webdataset` writes compressed ones as such"
    return f"{files} passed over: {remedy}" if counts else ""


def imported_in_place(folder: Path) -> str:
    """The shards that `data import webdataset` left where they are and reported on in `folder`, as a recipe names them;
    empty where its manifest.json says nothing of the kind."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != "webdataset" or manifest["options"]["copies"]:
            return ""
        return str(manifest["options"]["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _instead(folder: Path) -> str:
    """What a folder without a tar holds: the reports of an import in place, or files of a format that is imported."""
    if spec := imported_in_place(folder):
        return f"only the reports of an import that left the tars where they are: name {spec!r}"
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if what := other_format_at(path, texts=path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt")):
            return f"{path.name} {what}"
    return ""


def _expand_part(part: str, spec: str, root: Path) -> list[str]:
    if scheme_of(part):
        objects = ShardReader().expand(part)
        if not objects:
            raise DataError(f"shards {spec!r}: no object matches {part}")
        return objects
    if is_url(part):
        return [part]
    scheme = part.split(":", 1)[0] if ":" in part and not part.startswith("/") else ""
    if scheme == "pipe" or "://" in part:
        raise ConfigError(
            f"shards {spec!r}: the scheme {scheme!r} is not supported (it cannot be read by byte range, and pipe: "
            "would run a command); use a local path or an http(s), s3, gs, az or hf URL"
        )
    path = Path(os.path.abspath(root / os.path.expanduser(part)))
    if path.is_dir():
        matches = sorted(str(child) for child in path.iterdir() if child.suffix == ".tar")
        if not matches:
            others = passed_over_text(passed_over(part, root)) or _instead(path)
            raise DataError(f"shards {spec!r}: folder {path} holds no *.tar file{others and f' ({others})'}")
        return matches
    if path.exists():
        return [str(path)]
    matches = sorted(glob.glob(str(path))) if glob.has_magic(part) else []
    if matches:
        return matches
    what = f"no file matches {path}" if glob.has_magic(part) else f"{path} does not exist"
    error = DataError(f"shards {spec!r}: {what} (relative paths start at data.root, here {root.absolute()})")
    error.absent = str(path)
    raise error


class ShardReader:
    """Byte ranges of shards: os.pread on a bounded set of open files, or range requests to servers and stores on
    kept-alive connections.

    One per process (descriptors are opened by the process that reads); its threads may share it. `retries` is the
    number of tries of one read (`data.io_retries`); `index_dir` is what the shards it names carry.
    """

    def __init__(
        self, retries: int = DataConfig.io_retries, *, index_dir: str = "", sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._tries = max(1, retries)
        self._index_dir = index_dir and os.path.abspath(os.path.expanduser(index_dir))
        self._sleep = sleep
        self._http, self._stores = HttpRanges(), StoreRanges()
        self._begin()

    def stat(self, path: str) -> Shard:
        """Size and stamp of a shard. Raises DataError when it cannot be reached."""
        shard = self._retry(
            path, "its size", lambda: self._stat_url(path) if is_url(path) else _stat_local(path),
            tries=min(self._tries, STAT_TRIES),
        )  # fmt: skip
        return replace(shard, index_dir=self._index_dir)

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises DataError when the shard changed, is too short, or cannot be
        read."""
        if is_url(shard.path):
            remote = self._remote(shard.path)
            return self._retry(
                shard.path,
                f"bytes {offset} to {offset + size}",
                lambda: remote.read(shard.path, offset, size, file_size=shard.size, stamp=shard.stamp),
            )
        try:
            return self._read_local(shard, offset, size)
        except OSError as error:
            what = f"bytes {offset} to {offset + size}"
            return self._retry(shard.path, what, lambda: self._read_local(shard, offset, size), failed=error)

    def expand(self, url: str) -> list[str]:
        """The objects of a store that a glob, folder or name stands for (StoreRanges.expand). Raises DataError when it
        cannot be listed."""
        return self._retry(url, "its listing", lambda: self._stores.expand(url), tries=min(self._tries, STAT_TRIES))

    def close(self) -> None:
        """Close every descriptor this process opened, and this thread's connections."""
        if self._pid == os.getpid():
            for entry in self._open.values():
                os.close(entry.descriptor)
        self._begin()
        self._http.close()
        self._stores.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(ShardReader, index_dir=self._index_dir), (self._tries,))

    def _begin(self) -> None:
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _retry(
        self, path: str, what: str, action: Callable[[], _Result], *,
        failed: OSError | None = None, tries: int | None = None,
    ) -> _Result:  # fmt: skip
        """`action`, tried again; `failed` is the error of a first try that was made already."""
        wait, announced, tries = FIRST_BACK_OFF_S, False, tries or self._tries
        for attempt in range(1, tries + 1):
            try:
                if failed is not None and attempt == 1:
                    raise failed
                return action()
            except (OSError, http.client.HTTPException) as error:
                cause = str(error) or type(error).__name__
                if attempt == tries or _is_final(error):
                    raise DataError(
                        f"shard {path}: cannot read {what} after {attempt} tries: {cause}. An I/O error is never "
                        "skipped: check the disk, mount or server, then start again (it resumes); data.io_retries "
                        "sets the number of tries"
                    ) from error
                if wait > ANNOUNCED_BACK_OFF_S and not announced:
                    announced = True
                    print(
                        f"shard {path}: cannot read {what}: {cause}; tried again, at most {tries - attempt} times "
                        "(data.io_retries)", file=sys.stderr, flush=True,
                    )  # fmt: skip
                self._sleep(wait)
                wait = min(2 * wait, LONGEST_BACK_OFF_S)
        raise AssertionError("unreachable")

    def _remote(self, url: str) -> HttpRanges | StoreRanges:
        return self._stores if scheme_of(url) in STORES else self._http

    def _stat_url(self, url: str) -> Shard:
        status = self._remote(url).stat(url)
        return Shard(path=url, size=status.size, stamp=status.stamp)

    def _read_local(self, shard: Shard, offset: int, size: int) -> bytes:
        entry = self._acquire(shard)
        try:
            whole = os.pread(entry.descriptor, size, offset)
            if len(whole) == size:
                return whole
            chunks: list[bytes] = [whole] if whole else []
            done = len(whole)
            while done < size:
                chunk = os.pread(entry.descriptor, size - done, offset + done)
                if not chunk:
                    raise DataError(
                        f"shard {shard.path} ends at byte {offset + done}, inside bytes {offset} to {offset + size} "
                        "that its index names: it was truncated; restore the file and index it again"
                    )
                chunks.append(chunk)
                done += len(chunk)
            return b"".join(chunks)
        except OSError:
            with self._lock:
                if self._open.get(shard.path) is entry:
                    del self._open[shard.path]
            raise
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and self._open.get(shard.path) is not entry:
                    os.close(entry.descriptor)

    def _acquire(self, shard: Shard) -> _Open:
        """An open descriptor of the shard that no other thread closes meanwhile; a read that fails drops it, the
        next opens anew."""
        if self._pid != os.getpid():  # never use a descriptor or lock inherited through fork
            self._begin()
        with self._lock:
            entry = self._open.get(shard.path)
            if entry is None:
                entry = self._open[shard.path] = _Open(_open_checked(shard))
            self._open.move_to_end(shard.path)
            entry.users += 1
            if len(self._open) > MAX_OPEN_SHARDS:
                idle = [path for path, other in self._open.items() if not other.users]
                for path in idle[: len(self._open) - MAX_OPEN_SHARDS]:
                    os.close(self._open.pop(path).descriptor)
            return entry


@dataclass(slots=True)
class _Open:
    """An open shard and the number of reads under way on it."""

    descriptor: int
    users: int = 0


def read_spans(reader: ShardReader | ShardWindow, shard: Shard, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, size). Spans that lie together, as the files of a sample do, are one read: always
    where each is a request to a server, and on a local disk where a read costs more than the copy of its parts."""
    if len(spans) < 2:
        return [reader.read(shard, offset, size) for offset, size in spans]
    first = min([offset for offset, _ in spans])
    last = max([offset + size for offset, size in spans])
    apart = last - first > sum([size for _, size in spans]) + _JOIN_GAP
    if apart or (last - first > _JOIN_LOCAL and not is_url(shard.path)):
        return [reader.read(shard, offset, size) for offset, size in spans]
    whole = reader.read(shard, first, last - first)
    return [whole[offset - first : offset - first + size] for offset, size in spans]


class ShardWindow:
    """A shard read once, front to back, in large blocks: what the last two blocks hold is served from memory.

    `read` is a ShardReader's, so that code written for random access can follow a sequential pass without reading
    twice.
    """

    def __init__(self, reader: ShardReader, shard: Shard, block: int) -> None:
        self._reader, self._shard, self._block = reader, shard, block
        self._held: list[tuple[int, bytes]] = []

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises as ShardReader.read."""
        for start, data in self._held:
            if start <= offset and offset + size <= start + len(data):
                return data[offset - start : offset - start + size]
        if self._held and offset < self._held[-1][0]:  # behind the window, or across its blocks
            return self._reader.read(shard, offset, size)
        data = self._reader.read(shard, offset, min(max(size, self._block), shard.size - offset))
        self._held = [*self._held[-1:], (offset, data)]
        return data[:size]

    def up_to(self, offset: int, size: int) -> bytes:
        """At most `size` bytes: fewer at the end of the shard (the reader of tar headers)."""
        size = max(0, min(size, self._shard.size - offset))
        return self.read(self._shard, offset, size) if size else b""


def _is_final(error: Exception) -> bool:
    """An error that a retry cannot change: 4xx except 408 and 429, a missing file, permission or credentials."""
    if isinstance(error, HttpStatusError):
        return 300 <= error.code < 500 and error.code not in (408, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, http.client.InvalidURL))


def _stat_local(path: str) -> Shard:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"shard {path} is not a regular file; give tar files, or a folder that holds them")
    return Shard(path=path, size=status.st_size, stamp=str(status.st_mtime_ns))


def _open_checked(shard: Shard) -> int:
    descriptor = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        now = os.fstat(descriptor)
        if (now.st_size, str(now.st_mtime_ns)) != (shard.size, shard.stamp):
            raise DataError(
                f"shard {shard.path} changed since it was indexed (indexed: {shard.size} bytes, mtime {shard.stamp} "
                f"ns; now: {now.st_size} bytes, mtime {now.st_mtime_ns} ns); start again so that it is indexed anew"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def scan_members(shard: Shard, reader: ShardReader, most: int | None = None) -> ShardMembers:
    """List a shard's members from its tar headers alone; with `most` only those of its first samples.

    The key of a member is its name up to the first dot of the file name (the webdataset convention), the rest is its
    extension.

    Raises: DataError: for a compressed, truncated or corrupt tar, links, sparse files, data after the end marker, a key
    whose members are not together, or a field that a sample has twice; the message has the byte offset and the remedy.
    """
    window = ShardWindow(reader, shard, _SCAN_BLOCK_URL if is_url(shard.path) else _SCAN_BLOCK)
    keys: list[str] = []
    start, codes, offsets, sizes = [0], [], [], []
    extensions: dict[str, int] = {}
    ignored: list[tuple[str, str]] = []

    def stop(fault: TarFault, _: str | None) -> None:
        raise fault

    def leave_out(name: str, _: int, reason: str) -> None:
        ignored.append((name, reason))

    try:
        samples = group_members(tar_members(window.up_to, shard.size), on_fault=stop, on_stray=leave_out)
        for sample in islice(samples, most):
            keys.append(sample.key)
            for extension, member in sample.members.items():
                codes.append(extensions.setdefault(extension, len(extensions)))
                offsets.append(member.offset)
                sizes.append(member.size)
            start.append(len(codes))
    except TarFault as fault:
        raise DataError(
            f"shard {shard.path} ({fault.fault} at byte {fault.offset} of {shard.size}): {fault.reason}. "
            f"{_REMEDIES.get(fault.fault, _REWRITE)}"
        ) from fault
    return ShardMembers(
        keys=tuple(keys),
        member_start=np.array(start, np.int64),
        extensions=tuple(extensions),
        extension=np.array(codes, np.int32),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
        ignored=tuple(ignored),
    )

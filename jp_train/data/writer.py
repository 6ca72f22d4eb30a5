"""Plain tar shards, written so that a file with a shard's name is always whole.

A shard grows under a temporary name, is synced to disk, and only then gets its name: a kill at any moment leaves
complete shards and at most one `.NAME.tmp`, which the next writer of that shard replaces. Equal samples give equal
bytes: headers carry no time, owner or mode of the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jp_train.errors import ConfigError, DataError
from jp_train.files import fsync

SHARD_NAME = "{:06d}.tar"
"""Contiguous names: `folder/{000000..000127}.tar` lists them, and sorting them by name keeps the order."""

_BLOCK = 512
_END = b"\0" * (2 * _BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """A shard that is complete on disk: file name, bytes, samples, and the SHA-256 of its bytes as hex."""

    name: str
    size: int
    samples: int
    sha256: str


class ShardWriter:
    """Writes samples to `folder/000000.tar`, `000001.tar`, … A shard is closed before the sample that would take it
    past `max_bytes` or `max_samples`; a sample larger than `max_bytes` has a shard of its own.

    Use it as a context manager: on an exception the unfinished shard is removed, otherwise `finish` has been called for
    you.

    Raises:
        ConfigError: for bounds below one sample.
        DataError: when the disk refuses a write (full, read-only); finished shards stay.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_samples: int, number: int = 0) -> None:
        if max_bytes < 1 or max_samples < 1:
            raise ConfigError(
                f"a shard must hold at least one byte and one sample, got {max_bytes} bytes and {max_samples} samples"
            )
        self.number = number
        """Number of the shard that is being written, or is written next."""
        self._folder, self._max_bytes, self._max_samples = folder, max_bytes, max_samples
        self._file: BinaryIO | None = None
        self._samples = self._size = 0
        self._hash = hashlib.sha256()

    @property
    def begun(self) -> int:
        """Shards so far, numbers below the first one included, with the one that is open."""
        return self.number + (self._file is not None)

    def write(self, key: str, fields: Mapping[str, bytes]) -> WrittenShard | None:
        """Append `{key}.{extension}` for every field, in order; returns the shard that had to be closed first, if
        any."""
        return self.append(pack_sample(key, fields))

    def append(self, packed: bytes) -> WrittenShard | None:
        """The same for a sample that `pack_sample` made, perhaps in another process."""
        full = self._samples and (
            self._samples == self._max_samples or self._size + len(packed) + len(_END) > self._max_bytes
        )
        closed = self.finish() if full else None
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 - it stays open over many calls
            self._put(packed)
        except OSError as error:
            raise self._failure(error) from error
        self._samples += 1
        return closed

    def finish(self) -> WrittenShard | None:
        """Complete the shard that is open, if one is, and return it; the next `write` starts another."""
        if self._file is None:
            return None
        path = self._folder / SHARD_NAME.format(self.number)
        try:
            self._put(_END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, path)
            fsync(self._folder)
        except OSError as error:
            raise self._failure(error) from error
        written = WrittenShard(name=path.name, size=self._size, samples=self._samples, sha256=self._hash.hexdigest())
        self._file = None
        self._samples = self._size = 0
        self._hash = hashlib.sha256()
        self.number += 1
        return written

    def discard(self) -> None:
        """Remove the unfinished shard; finished ones stay."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be flushed is removed anyway
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{SHARD_NAME.format(self.number)}.tmp"

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write shard {self._folder / SHARD_NAME.format(self.number)}: {error}; finished shards are kept: "
            "free space or mend the folder, then run the same command again"
        )


def pack_sample(key: str, fields: Mapping[str, bytes]) -> bytes:
    """The tar members `{key}.{extension}` of one sample, without an end marker: shards are such pieces one after the
    other."""
    parts: list[bytes] = []
    for extension, data in fields.items():
        parts += [_header(f"{key}.{extension}", len(data)), data, b"\0" * (-len(data) % _BLOCK)]
    return b"".join(parts)


def _header(name: str, size: int) -> bytes:
    """The header of a file: owner and time 0, mode 0644. tarfile takes 20 microseconds per header, which is long for a
    short text, so it is only used for names and sizes that need more than one block."""
    encoded = name.encode()
    if len(encoded) > _NAME or size >= 8 << 30:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    digits = b"%011o" % size
    checksum = _HEADER_SUM + sum(encoded) + sum(digits)
    return b"".join((encoded, bytes(_NAME - len(encoded)), _BEFORE, digits, _TIME, b"%06o\0 " % checksum, _AFTER))


_NAME = 100
_BEFORE = b"0000644\0" + b"0000000\0" * 2
_TIME = b"\0" + b"00000000000\0"
_AFTER = b"0" + bytes(_NAME) + b"ustar  \0" + bytes(_BLOCK - 265)
_HEADER_SUM = sum(_BEFORE) + sum(_TIME) + 8 * ord(" ") + sum(_AFTER)  # the checksum counts itself as 8 spaces

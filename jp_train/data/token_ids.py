"""Token ids of a sample's texts, kept in the tokens sidecar (sidecar.py), so that training neither reads nor tokenises
a text.

A sample's record is its document without image and draws: runs of ids with one role, in order. Little-endian:

    uint32                the number of runs
    uint32 [runs]         length * 4 + role of each; an image is a run of no ids
    uint16 [ids]          the low 16 bits of all ids
    bits [ids] x planes   one more bit of each id a plane, eight to a byte: none up to 65,536 ids, one up to 131,072

Roles of an understanding or text document: READ, LEARN, ASK (layouts.py) or IMAGE; which question is learnt is decided
when the row is made. A generation document holds its condition, and what the first sentence alone has in common with
it: BOTH + WHOLE is the whole caption's, BOTH + SHORT that of the first sentence.

Records are read as byte ranges through the ShardReader, whose errors name the file: a mapped file would end the process
without a message when the disk fails. Ranks share the pages all the same, in the page cache.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jp_train.data.shards import Shard, ShardReader
from jp_train.errors import DataError

IMAGE = 3
"""The role of an image's place; the others of such a document are those of layouts.py (PAD is drawn, never stored)."""
BOTH, WHOLE, SHORT = 0, 1, 2

_LOW_BITS = 16
_ROLE_BITS = 2

Run = tuple[Sequence[int], int]
"""Ids, and their role."""


def planes_for(vocab_size: int) -> int:
    """Bits above the low 16 that the ids of a vocabulary need."""
    return max(0, (vocab_size - 1).bit_length() - _LOW_BITS)


def condition_runs(whole: list[int], short: list[int]) -> list[Run]:
    """The runs of a generation document from its condition with the whole caption and with the first sentence."""
    common = 0
    while common < min(len(whole), len(short)) and whole[common] == short[common]:
        common += 1
    return [(whole[:common], BOTH), (whole[common:], WHOLE), (short[common:], SHORT)]


def pack(runs: Sequence[Run], planes: int) -> bytes:
    """The record of runs."""
    ids = np.array([token for values, _ in runs for token in values], np.uint32)
    head = struct.pack(f"<{1 + len(runs)}I", len(runs), *[len(values) << _ROLE_BITS | role for values, role in runs])
    high = [np.packbits((ids >> (_LOW_BITS + plane) & 1).astype(np.uint8)).tobytes() for plane in range(planes)]
    return b"".join([head, (ids & 0xFFFF).astype("<u2").tobytes(), *high])


def unpack(record: bytes, planes: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(length, role) of each run of a record, and all ids, int32. Raises ValueError for bytes that are no record."""
    (count,) = _UINT32.unpack_from(record)
    codes = _uints(count).unpack_from(record, 4)
    runs = [(code >> _ROLE_BITS, code & 3) for code in codes]
    total = sum([length for length, _ in runs])
    at = 4 + 4 * count
    plane_bytes = (total + 7) // 8
    if len(record) != at + 2 * total + planes * plane_bytes:
        raise ValueError(f"{len(record)} bytes for {total} ids in {count} runs")
    ids = np.frombuffer(record, "<u2", total, at).astype(np.int32)
    at += 2 * total
    for plane in range(planes):
        bits = np.unpackbits(np.frombuffer(record, np.uint8, plane_bytes, at), count=total)
        ids += bits.astype(np.int32) << (_LOW_BITS + plane)
        at += plane_bytes
    return runs, ids


class RecordSpool:
    """The records of a shard on their way into its sidecar, in a temporary file: a shard of texts is not held in
    memory. Use it as a context."""

    def __init__(self) -> None:
        self._starts = [0]
        try:
            self._file = tempfile.TemporaryFile(prefix="jp_train-index-")  # noqa: SIM115 - __exit__ closes it
        except OSError as error:
            raise _no_room(error) from error

    def __enter__(self) -> RecordSpool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, record: bytes) -> None:
        """The next usable sample's record. Raises DataError when the temporary file cannot be written."""
        try:
            self._file.write(record)
        except OSError as error:
            raise _no_room(error) from error
        self._starts.append(self._starts[-1] + len(record))

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self._starts[-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """What the sidecar holds: `record_start` int64 [G + 1], and `records` uint8, mapped from the temporary file."""
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        records = np.memmap(self._file, np.uint8, "r", shape=(self.size,)) if self.size else np.zeros(0, np.uint8)
        return {"record_start": np.array(self._starts, np.int64), "records": records}


@dataclass(frozen=True, slots=True)
class StoredTokenIds:
    """The records of one shard: `file` is the sidecar, `first` the byte where they begin, `record_start` int64 [G +
    1]."""

    file: Shard
    first: int
    record_start: np.ndarray
    reader: ShardReader

    def record(self, entry: int) -> bytes:
        """The record of usable sample `entry`. Raises DataError when it cannot be read, or the file is another one
        by now."""
        start, end = self.record_start[entry : entry + 2].tolist()
        return self.reader.read(self.file, self.first + start, end - start)


@lru_cache(maxsize=256)
def _uints(count: int) -> struct.Struct:
    if count > 1 << 24:
        raise ValueError(f"a record of {count} runs")
    return struct.Struct(f"<{count}I")


_UINT32 = struct.Struct("<I")


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"the token ids of a shard cannot be kept while it is indexed: {error}; make room in {tempfile.gettempdir()} "
        "(or set TMPDIR to another folder), or set data.token_ids=off"
    )

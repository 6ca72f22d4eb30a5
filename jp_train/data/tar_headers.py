"""The headers of a tar, one after another: strict about what a shard may be, bounded in memory, exact about where it
breaks.

Python's tarfile ends quietly at a header it cannot read and trusts every size it finds; a training shard must be whole
or named as broken. Names are only keys: nothing here opens, creates or joins a path.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jp_train.files import known_format, stand_in, text_format

BLOCK = 512
MAX_EXTENDED = 1 << 20
"""Bytes of a long-name or PAX header; a longer one is damage, and would otherwise be read into memory."""

TRUNCATED, CORRUPT, AFTER_END, COMPRESSED, LINK, NO_TAR = (
    "truncated_tar",
    "corrupt_tar",
    "data_after_end",
    "compressed_tar",
    "link_or_device",
    "not_a_tar",
)

_CHECK_BYTES = 1 << 20
_FILE_TYPES = frozenset(b"0\0" + b"7")
_NO_DATA_TYPES = frozenset(b"123456")
_FOLDER, _SPARSE, _LONG_NAME, _LONG_LINK = b"5"[0], b"S"[0], b"L"[0], b"K"[0]
_PAX = frozenset(b"xX")
_PAX_GLOBAL = b"g"[0]
_EXTENSIONS = _PAX | {_PAX_GLOBAL, _LONG_NAME, _LONG_LINK}
_SPARSE_RECORDS = b"GNU.sparse"
COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zX", "xz"))
"""First bytes of a compressed file, and the name of the compression."""

Read = Callable[[int, int], bytes]
"""(offset, size) -> the bytes there; fewer only at the end of the shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One entry: its name, whether it is a plain `file` or a `folder` (neither: a link, device or sparse file), the
    offset of its first header, and the offset and size of its data, in bytes."""

    name: str
    file: bool
    folder: bool
    header: int
    offset: int
    size: int


class TarFault(Exception):  # noqa: N818 - a finding that callers turn into a DataError or a line of a report
    """What is wrong with a tar: `fault` is its class, `offset` the byte of the shard where it shows."""

    def __init__(self, fault: str, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.offset, self.reason = fault, offset, reason


def tar_members(read: Read, size: int) -> Iterator[Member]:
    """Every member of a tar of `size` bytes, in order.

    Raises:
        TarFault: where it is no tar, or one that is compressed, truncated or damaged, or goes on after its end marker.
        What was yielded before is whole.
    """
    start = read(0, min(BLOCK, size))
    _refuse_compressed(start)
    if start and (what := stand_in(start)):
        raise TarFault(CORRUPT, 0, f"it {what}")
    everywhere: dict[str, str] = {}
    try:
        member = _next_member(read, 0, size, everywhere)
    except TarFault:
        if start[257:262] != b"ustar" and (what := known_format(start) or text_format(start)):
            raise TarFault(NO_TAR, 0, f"it is no tar but {what}") from None
        raise
    while member is not None:
        yield member
        member = _next_member(read, member.offset + _padded(member.size), size, everywhere)


def _refuse_compressed(start: bytes) -> None:
    """Raises TarFault for a compressed file; one of gzip is opened, as it may hold something else than a tar."""
    name = next((name for magic, name in COMPRESSIONS if start.startswith(magic)), "")
    if not name:
        return
    inside = b""
    if name == "gzip":
        with contextlib.suppress(zlib.error):
            inside = zlib.decompressobj(wbits=31).decompress(start, BLOCK)
    if inside[257:262] != b"ustar" and (what := known_format(inside) or text_format(inside)):
        raise TarFault(NO_TAR, 0, f"it is no tar but, inside gzip, {what}")
    reason = (
        f"it is compressed ({name}), so byte ranges cannot be read from it; decompress it to a plain .tar, which "
        "`jp-train data import webdataset` does"
    )
    raise TarFault(COMPRESSED, 0, reason)


def _next_member(read: Read, first: int, size: int, everywhere: dict[str, str]) -> Member | None:
    """The member whose first header is at `first`, None at the end marker. Global PAX records are added to
    `everywhere`."""
    local: dict[str, str] = {}
    position, extended = first, False
    header = _header(read, position, size)
    while header is not None and header[156] in _EXTENSIONS:
        kind = header[156]
        length = _number(header[124:136], position, "size")
        blob = _extended(read, position + BLOCK, length, position, size)
        if kind == _LONG_NAME:
            local["path"] = _text(blob)
        elif kind == _PAX_GLOBAL:
            everywhere |= _pax_records(blob, position)
        elif kind in _PAX:
            local |= _pax_records(blob, position)
        extended |= kind != _PAX_GLOBAL
        position += BLOCK + _padded(length)
        header = _header(read, position, size)
    if header is not None:
        return _member(header, position, first, size, local, everywhere)
    if extended:
        reason = f"the archive ends after a header extension at byte {first} that belongs to no file"
        raise TarFault(CORRUPT, position, reason)
    _check_rest(read, position, size)
    return None


def _member(
    header: bytes, position: int, first: int, size: int, local: dict[str, str], everywhere: dict[str, str]
) -> Member:
    """The member of a header at `position` whose extensions, the first of them at `first`, hold the records `local`."""
    kind = header[156]
    length = _number(header[124:136], position, "size")
    data = position + BLOCK
    extra = everywhere | local if everywhere else local
    name = extra["path"] if "path" in extra else _name(header)
    if kind == _SPARSE or _SPARSE_RECORDS.decode() in extra:
        reason = f"member {name!r} is a sparse file; a shard may hold plain files only: write it again"
        raise TarFault(LINK, first, reason)
    if "size" in local:
        length = _pax_size(local["size"], position)
    folder = kind == _FOLDER or (kind == 0 and name.endswith("/"))
    if folder or kind in _NO_DATA_TYPES:
        length = 0
    if data + length > size:
        raise TarFault(
            TRUNCATED,
            first,
            f"member {name!r} of {length} bytes at byte {data} runs past the end of the file, which has {size} bytes",
        )
    return Member(
        name=name, file=kind in _FILE_TYPES and not folder, folder=folder, header=first, offset=data, size=length
    )


def _header(read: Read, position: int, size: int) -> bytes | None:
    """The header block at `position`, None at the end marker."""
    header = read(position, BLOCK) if position < size else b""
    if len(header) < BLOCK:
        raise TarFault(
            TRUNCATED,
            min(position, size),
            f"it ends at byte {size} without the end-of-archive marker: it was truncated while being written or copied",
        )
    total = sum(header)
    if total == 0:
        return None
    field = header[148:156]
    stored = _number(field, position, "checksum")
    unsigned = total - sum(field) + 8 * 32
    if stored != unsigned:
        above = sum(byte > 127 for byte in header[:148]) + sum(byte > 127 for byte in header[156:])
        if stored != unsigned - 256 * above:  # very old tars summed signed bytes
            raise TarFault(
                CORRUPT,
                position,
                f"the block at byte {position} is neither a tar header nor the end of the archive (checksum)",
            )
    return header


def _number(field: bytes, position: int, what: str) -> int:
    """Octal digits, or base 256 for sizes of 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if any(not 0x30 <= digit <= 0x37 for digit in digits):
        raise TarFault(
            CORRUPT,
            position,
            f"the block at byte {position} is neither a tar header nor the end of the archive ({what} {field!r})",
        )
    return int(digits, 8) if digits else 0


def _extended(read: Read, data: int, length: int, position: int, size: int) -> bytes:
    if length > MAX_EXTENDED:
        raise TarFault(
            CORRUPT,
            position,
            f"the header extension at byte {position} claims {length} bytes; at most {MAX_EXTENDED} make sense",
        )
    if data + length > size:
        raise TarFault(
            TRUNCATED,
            position,
            f"the header extension at byte {position} runs past the end of the file, which has {size} bytes",
        )
    return read(data, length)


def _pax_records(blob: bytes, position: int) -> dict[str, str]:
    """Of the `length key=value\\n` records those that decide a member's name, size and kind (sparse or not)."""
    records: dict[str, str] = {}
    at = 0
    while at < len(blob) and blob[at]:
        space = blob.find(b" ", at, at + 9)
        digits = blob[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = blob[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(blob) or blob[end - 1 : end] != b"\n" or not equals:
            raise TarFault(CORRUPT, position, f"the PAX header at byte {position} is malformed")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(_SPARSE_RECORDS):
            records[_SPARSE_RECORDS.decode()] = ""
        at = end
    return records


def _pax_size(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise TarFault(CORRUPT, position, f"the PAX header before byte {position} gives the size {text[:40]!r}")
    return int(text)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _check_rest(read: Read, position: int, size: int) -> None:
    at = position + BLOCK
    while at < size:
        block = read(at, min(_CHECK_BYTES, size - at))
        if not block:
            return
        if block.count(0) != len(block):
            raise TarFault(
                AFTER_END,
                at + len(block) - len(block.lstrip(b"\0")),
                f"it has data after its end-of-archive marker at byte {position} (tars joined with cat?); its later "
                "samples would be lost: write it again as one tar",
            )
        at += len(block)

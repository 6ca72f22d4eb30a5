"""Members of a tar -> samples: files with one key (the name up to the first dot of the file name) that lie together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from jp_train.data.tar_headers import AFTER_END, LINK, Member, TarFault

DUPLICATE, INTERLEAVED, DUPLICATE_FIELD = "duplicate_key", "interleaved_key", "duplicate_field"

STRAY = "the file name has no key or no extension: it belongs to no sample"

_BITS = 63
"""Extensions that are distinguished when a key comes again; all further ones count as one."""

_NOTES = re.compile(r"__[^/]*__(/|$)")
"""What webdataset passes over: `skip_meta` of its tar_file_iterator."""


@dataclass(slots=True)
class TarSample:
    """A key and its files by extension (lower case, without the dot), in tar order."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


def group_members(
    members: Iterable[Member],
    *,
    on_fault: Callable[[TarFault, str | None], None],
    on_stray: Callable[[str, int, str], None],
) -> Iterator[TarSample]:
    """The samples of a shard, each when its last file has passed.

    `on_fault(fault, key)` is called for links and devices (without a key), for keys that come again after others (once
    per key), and for fields that a sample has twice. Unless it raises, the pass goes on without that link, the later
    part of that key, or the later field. `on_stray(name, offset, reason)` is called for files that belong to no sample.
    A TarFault of `members` passes through; the sample that it may have cut is not yielded.
    """
    numbers: dict[str, int] = {}
    extensions_of: dict[str, int] = {}
    codes: dict[str, int] = {}
    current: TarSample | None = None
    ended: list[TarFault] = []
    again: set[str] = set()
    for member, key, extension in _files(_until_fault(members, ended), on_fault, on_stray):
        bit = 1 << min(codes.setdefault(extension, len(codes)), _BITS - 1)
        if current is None or key != current.key:
            if key in numbers:
                if key not in again:
                    reason = (
                        f"key {key!r} appears again after other samples (first as sample {numbers[key]}); the files of "
                        "one sample must be adjacent and keys unique: write the shard again"
                    )
                    kind = DUPLICATE if extensions_of[key] & bit else INTERLEAVED
                    on_fault(TarFault(kind, member.header, reason), key)
                    again.add(key)
                continue
            if current is not None:
                yield current
            numbers[key] = len(numbers)
            extensions_of[key] = 0
            current = TarSample(key)
        if extension in current.members:
            reason = f"key {key!r} has two .{extension} files; keys must be unique within a shard"
            on_fault(TarFault(DUPLICATE_FIELD, member.header, reason), key)
            continue
        extensions_of[key] |= bit
        current.members[extension] = member
    if current is not None and (not ended or ended[0].fault == AFTER_END):
        yield current
    for fault in ended:
        raise fault


def _files(
    members: Iterable[Member],
    on_fault: Callable[[TarFault, str | None], None],
    on_stray: Callable[[str, int, str], None],
) -> Iterator[tuple[Member, str, str]]:
    """Every plain file that belongs to a sample, with its key and extension."""
    for member in members:
        if member.file:
            key, extension = split_name(member.name)
            if _NOTES.match(member.name):
                on_stray(member.name, member.header, "names like __this__ are webdataset's own notes, no sample")
                continue
            if key:
                yield member, key, extension
                continue
            on_stray(member.name, member.header, STRAY)
        elif not member.folder:
            reason = f"member {member.name!r} is a link or device; a shard may hold plain files only: write it again"
            on_fault(TarFault(LINK, member.header, reason), None)


def _until_fault(members: Iterable[Member], ended: list[TarFault]) -> Iterator[Member]:
    try:
        yield from members
    except TarFault as fault:
        ended.append(fault)


def collapsed(extensions: Sequence[str]) -> str:
    """What to say of a sample whose files look like those of several samples, because their names have dots."""
    inner = [extension.rpartition(".")[2] for extension in extensions if "." in extension]
    if len(inner) == len(set(inner)):
        return ""
    return (
        f"; {len(extensions)} files collapse into one key, which ends at the first dot of a file name (webdataset's "
        "rule): if they are several samples, give them names without dots"
    )


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name; two empty strings when it has none, or a NUL, which no list of keys could
    store."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or "\0" in name:
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()

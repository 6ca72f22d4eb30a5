"""The index files of one shard: written atomically, read without pickles, ignored when they belong to other content.

    X.tar.jp-members.npz           keys, extensions, byte offsets and sizes; valid for one size and stamp of the shard
    X.tar.jp-tokens-<print>.npz    token counts of the usable samples, the token ids of their texts (token_ids.py;
                                   unless
                                   data.token_ids=off), and the bad ones with their reasons; valid for one fingerprint
                                   of tokenizer, template, options and source settings, so stages do not overwrite each
                                   other
    X.tar.jp-excluded.json         samples that `data verify --exclude` took out (exclusions.py); their digest is in the
                                   name and
                                   the meta data of the tokens file: .jp-tokens-<print>-x<digest>.npz
    X.tar.jp-vq-<print>.npy, .json ids of the images and what they were made with (vq_ids.py)

They lie beside the shard, or in $XDG_CACHE_HOME/jp_train/index (default ~/.cache) when its folder is read-only or
remote. With `data.index_dir` all are written there, and what lies at the other places is only read. In a folder that is
not the shard's own, each shard has a folder named after its whole path. Each is written under a temporary name and
renamed, so concurrent builders are harmless; the temporary files of a killed one are removed later.

A sidecar that came with the data is not trusted more than the data: one that contradicts the shard or itself counts as
damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.lib.npyio import NpzFile

from jp_train.data.shards import Shard, ShardMembers, ShardReader, is_url
from jp_train.data.token_ids import RecordSpool, StoredTokenIds
from jp_train.errors import DataError
from jp_train.files import file_system_time, replacing

FORMAT = 2
"""Increase it when a sidecar's layout changes: older files are then rebuilt."""

RULES = 3
"""Increase it when samples become usable that were bad, or conversations are read otherwise: older files that name bad
samples, or were counted from conversations, are then rebuilt."""

_NO_CONVERSATION = re.compile(r'\.txt|\.cls|"(caption|captions|text|TEXT)(\[.*\])?" of \.json')
"""The usual places of captions and texts, as `taken` has them."""

_MEMBERS = ".jp-members.npz"
_Made = TypeVar("_Made")
_NAME_LENGTH_AT = 26
"""Where the header before a member of a zip has the lengths of name and extra field, uint16 each; the content
follows them."""
_LEFT_BEHIND_S = 3600
"""A temporary file of this age, in seconds, has no writer any more: writing one takes seconds. Process ids cannot tell,
as the writer may be on another host."""


@dataclass(frozen=True, kw_only=True)
class ShardTokens:
    """The tokens sidecar of a shard: G entries, one for each usable sample, or for each of its captions where it has
    several.

    `images`, `min_tokens` int32 [G], of samples to understand: as in TokenCounts; None where each has one image, with
    nothing before it but the template.
    `sample` int32 [G]: their samples' numbers in the shard, ascending; `tokens`, `short_tokens`, `dropped_tokens`,
    `short_dropped_tokens` int32 [G]; `bad`: (key, reason) of samples that cannot be used; `taken`: how many samples
    have their texts at which places, `filtered`: how many fail which filter, `notes`: how many needed which change to
    be read; `ids_bytes`: size of the stored token ids, None without.
    """

    sample: np.ndarray
    tokens: np.ndarray
    short_tokens: np.ndarray
    dropped_tokens: np.ndarray
    short_dropped_tokens: np.ndarray
    conversations: int
    bad: tuple[tuple[str, str], ...]
    ids_bytes: int | None = None
    taken: tuple[tuple[str, int], ...] = ()
    filtered: tuple[tuple[str, int], ...] = ()
    notes: tuple[tuple[str, int], ...] = ()
    images: np.ndarray | None = None
    min_tokens: np.ndarray | None = None

    @cached_property
    def first_entry(self) -> np.ndarray | None:
        """int64 [N + 1]: where the entries of each of the N usable samples begin; None where each has one."""
        new = np.diff(self.sample, prepend=-1) != 0
        return None if new.all() else np.append(np.flatnonzero(new), len(self.sample))

    def __len__(self) -> int:
        """Usable samples."""
        return len(self.sample) if self.first_entry is None else len(self.first_entry) - 1


def load_members(shard: Shard) -> ShardMembers | None:
    """The members sidecar of a shard, or None when there is none for its size and stamp."""
    return _read(shard, _MEMBERS, _identity(shard), lambda meta, arrays: _members(shard, meta, arrays))


def has_members(shard: Shard) -> bool:
    """Whether a current members sidecar exists; cheaper than loading it."""
    return member_extensions(shard) is not None


def member_extensions(shard: Shard) -> tuple[str, ...] | None:
    """The file extensions in a shard, from the members sidecar; None when there is no current one. Cheaper than
    loading it."""
    return _read(shard, _MEMBERS, _identity(shard), lambda meta, _: _texts(meta["extensions"]))


def load_tokens(shard: Shard, fingerprint: str, *, with_ids: bool = False) -> ShardTokens | None:
    """The tokens sidecar of a shard for a fingerprint, or None when there is none that is current, and (`with_ids`)
    holds token ids."""

    def made(meta: dict[str, Any], arrays: NpzFile) -> ShardTokens:
        tokens = _tokens(meta, arrays)
        _require(not with_ids or tokens.ids_bytes is not None)
        return tokens

    return _read(shard, _tokens_suffix(shard, fingerprint), _tokens_identity(shard, fingerprint), made)


def open_tokens(shard: Shard, fingerprint: str, reader: ShardReader) -> tuple[ShardTokens, StoredTokenIds] | None:
    """The tokens sidecar of a shard, and its token ids, to be read through `reader`; None when there is no current
    one that has them."""

    def made(meta: dict[str, Any], arrays: NpzFile) -> tuple[ShardTokens, StoredTokenIds]:
        tokens = _tokens(meta, arrays)
        archive, size = arrays.zip, tokens.ids_bytes
        assert archive is not None and archive.fp is not None and archive.filename is not None
        if size is None:
            raise KeyError("token ids")
        starts, part, file = arrays["record_start"], archive.getinfo("records.npy"), archive.fp
        with archive.open(part) as content:  # its header says where the bytes begin
            _require(np.lib.format.read_magic(content) == (1, 0))
            shape, _, dtype = np.lib.format.read_array_header_1_0(content)
            header = content.tell()
        _require(starts.dtype == np.int64 and starts.shape == (len(tokens.sample) + 1,))
        _require(starts[0] == 0 and (starts[1:] >= starts[:-1]).all() and starts[-1] == size)
        _require(dtype == np.uint8 and shape == (size,) and part.file_size == header + size)
        file.seek(part.header_offset + _NAME_LENGTH_AT)
        name, extra = struct.unpack("<HH", file.read(4))
        status = os.fstat(file.fileno())
        here = Shard(path=archive.filename, size=status.st_size, stamp=str(status.st_mtime_ns))
        first = part.header_offset + _NAME_LENGTH_AT + 4 + name + extra + header
        _require(first + size <= here.size)  # else a read would ask for memory that the file never fills
        return tokens, StoredTokenIds(here, first, starts, reader)

    return _read(shard, _tokens_suffix(shard, fingerprint), _tokens_identity(shard, fingerprint), made)


def _members(shard: Shard, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> ShardMembers:
    keys, extensions = tuple(_unpack(arrays["keys"])), _texts(meta["extensions"])
    start, extension = arrays["member_start"], arrays["extension"]
    offset, size = arrays["offset"], arrays["size"]
    count = len(extension)
    _require(start.dtype == offset.dtype == size.dtype == np.int64 and extension.dtype == np.int32)
    _require(start.shape == (len(keys) + 1,) and extension.shape == offset.shape == size.shape == (count,))
    _require(start[0] == 0 and start[-1] == count and (start[1:] > start[:-1]).all())
    _require(((extension >= 0) & (extension < len(extensions))).all())
    _require(((offset >= 0) & (size >= 0) & (size <= shard.size) & (offset <= shard.size - size)).all())
    return ShardMembers(
        keys=keys,
        member_start=start,
        extensions=extensions,
        extension=extension,
        offset=offset,
        size=size,
        ignored=_pairs(meta["ignored"]),
    )


def _tokens(meta: dict[str, Any], arrays: NpzFile) -> ShardTokens:
    sample, table = arrays["sample"], arrays["table"]
    _require(sample.dtype == table.dtype == np.int32 and sample.ndim == 1 and table.shape == (4, len(sample)))
    _require(
        (sample[:1] >= 0).all()
        and (np.diff(sample) >= (0 if meta.get("variants") else 1)).all()
        and (table >= 0).all()
        and (table[0] > 0).all()
        and isinstance(meta["dialogues"], int)
        and (meta.get("rules") == RULES or not (meta["bad"] or _from_conversations(meta)))
    )
    images = min_tokens = None
    if "images" in arrays:
        images, min_tokens = arrays["images"]
        _require(images.dtype == np.int32 and images.shape == min_tokens.shape == sample.shape)
        _require((images >= 0).all() and (min_tokens >= 0).all() and (min_tokens <= table[0]).all())
    return ShardTokens(
        sample=arrays["sample"],
        tokens=table[0],
        short_tokens=table[1],
        dropped_tokens=table[2],
        short_dropped_tokens=table[3],
        conversations=meta["dialogues"],
        bad=_pairs(meta["bad"]),
        ids_bytes=_size(meta["ids_bytes"]) if "records" in arrays else None,
        taken=_counts(meta.get("taken", [])),
        filtered=_counts(meta.get("filtered", [])),
        notes=_counts(meta.get("notes", [])),
        images=images,
        min_tokens=min_tokens,
    )


def _from_conversations(meta: dict[str, Any]) -> bool:
    """Whether a sidecar of older rules may have counts of conversations, whatever its source names them."""
    taken = _counts(meta.get("taken", []))
    return not taken or not all(_NO_CONVERSATION.fullmatch(place) for place, _ in taken)


def store_members(shard: Shard, members: ShardMembers) -> None:
    """Write the members sidecar. Raises DataError when neither place can be written."""
    meta = {"extensions": members.extensions, "ignored": members.ignored}
    arrays = {
        "keys": np.frombuffer("\0".join(members.keys).encode("utf-8", "surrogateescape"), np.uint8),
        "member_start": members.member_start,
        "extension": members.extension,
        "offset": members.offset,
        "size": members.size,
    }
    _write(shard, _MEMBERS, _identity(shard) | meta, arrays)


def store_tokens(shard: Shard, fingerprint: str, tokens: ShardTokens, records: RecordSpool | None = None) -> None:
    """Write the tokens sidecar, with token ids where `records` has them. Raises DataError when neither place can be
    written."""
    meta = _tokens_identity(shard, fingerprint) | {
        "dialogues": tokens.conversations,
        "rules": RULES,
        "variants": tokens.first_entry is not None,
        "bad": tokens.bad,
        "taken": tokens.taken,
        "filtered": tokens.filtered,
        "notes": tokens.notes,
        "ids_bytes": tokens.ids_bytes,
    }
    table = np.stack([tokens.tokens, tokens.short_tokens, tokens.dropped_tokens, tokens.short_dropped_tokens])
    stored = {} if records is None else records.arrays()
    if tokens.images is not None and tokens.min_tokens is not None:
        stored["images"] = np.stack([tokens.images, tokens.min_tokens])
    _write(shard, _tokens_suffix(shard, fingerprint), meta, {"sample": tokens.sample, "table": table, **stored})


def _tokens_suffix(shard: Shard, fingerprint: str) -> str:
    """Another name for other exclusions: a run that goes on while samples are excluded keeps reading the table it
    began with."""
    return f".jp-tokens-{fingerprint[:12]}{f'-x{shard.excluded[:8]}' if shard.excluded else ''}.npz"


def _tokens_identity(shard: Shard, fingerprint: str) -> dict[str, Any]:
    return _identity(shard) | {"fingerprint": fingerprint, "excluded": shard.excluded or None}


def _identity(shard: Shard) -> dict[str, Any]:
    return {"format": FORMAT, "size": shard.size, "stamp": shard.stamp}


def sidecar_places(shard: Shard, suffix: str) -> list[Path]:
    """Where a sidecar may be: in `data.index_dir`, beside the shard, then in the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jp_train" / "index"
    inside = Path(hashlib.sha256(os.fsencode(shard.path)).hexdigest()[:32]) / f"{shard.name}{suffix}"
    beside = [] if is_url(shard.path) else [Path(shard.path + suffix)]
    return [*([Path(shard.index_dir) / inside] if shard.index_dir else []), *beside, cache / inside]


def written_places(shard: Shard, suffix: str) -> list[Path]:
    """Those of the places that a sidecar is written to, the first that can be: with `data.index_dir` only that."""
    return sidecar_places(shard, suffix)[: 1 if shard.index_dir else None]


def write_sidecar(shard: Shard, suffix: str, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a sidecar in the first place that can be written: temporary file, fsync, rename. Returns its
    path.

    Raises DataError when no place can be written.
    """
    problems = []
    places = written_places(shard, suffix)
    for path in places:
        try:
            if path is places[-1]:
                path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(path.parent)
            with replacing(path, writer=f"{os.getpid()}.{os.urandom(4).hex()}") as file:
                write(file)
            return path
        except OSError as error:
            problems.append(str(error))
    raise DataError(
        f"cannot write the index of shard {shard.path}: {'; '.join(problems)}; name a folder for it that is writable "
        "and has room, on all hosts the same: data.index_dir"
        f"{f' (now {shard.index_dir})' if shard.index_dir else '=FOLDER'}"
    )


@lru_cache(maxsize=1024)
def _remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of killed writers; once per folder and process, because listing a large folder
    takes time."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        leftovers = [e for e in entries if e.name.startswith(".") and ".jp-" in e.name and e.name.endswith(".tmp")]
        now = file_system_time(folder) if leftovers else 0.0
        for entry in leftovers:
            with contextlib.suppress(OSError):
                if now - entry.stat().st_mtime > _LEFT_BEHIND_S:
                    os.unlink(entry.path)


def _write(shard: Shard, suffix: str, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    blob = np.frombuffer(json.dumps(meta, ensure_ascii=True).encode(), np.uint8)
    contents: dict[str, Any] = {"meta": blob, **arrays}
    write_sidecar(shard, suffix, lambda file: np.savez(file, **contents))


def _read(
    shard: Shard, suffix: str, expected: dict[str, Any], made: Callable[[dict[str, Any], NpzFile], _Made]
) -> _Made | None:
    """`made` of the meta data and the arrays (read when asked for) of a sidecar; None when it is absent, of other
    content, or damaged."""
    for path in sidecar_places(shard, suffix):
        try:
            with np.load(path, allow_pickle=False) as file:
                _require(all(part.compress_type == zipfile.ZIP_STORED for part in file.zip.infolist()))  # no bomb
                meta = json.loads(bytes(file["meta"]))
                if all(meta.get(key) == value for key, value in expected.items()):
                    return made(meta, file)
        except Exception:
            # zip, deflate, numpy and JSON each raise many kinds on broken bytes; whatever it is, it is built again
            continue
    return None


def _require(holds: bool | np.bool_) -> None:
    if not holds:
        raise ValueError("the sidecar contradicts the shard or itself")


def _texts(values: Any) -> tuple[str, ...]:
    _require(isinstance(values, list) and all(isinstance(value, str) for value in values))
    return tuple(values)


def _size(value: Any) -> int:
    _require(type(value) is int and value >= 0)
    return value


def _counts(values: Any) -> tuple[tuple[str, int], ...]:
    return tuple((_texts([text])[0], _size(count)) for text, count in values)


def _pairs(values: Any) -> tuple[tuple[str, str], ...]:
    return tuple((name, reason) for name, reason in map(_texts, values))


def _unpack(blob: np.ndarray) -> list[str]:
    text = bytes(blob).decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []

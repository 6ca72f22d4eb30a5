"""The index files of one shard: written atomically, read without pickles, ignored when they belong to other content.

    X.tar.jp-members.npz           keys, extensions, byte offsets and sizes; valid for one size and stamp of the shard
    X.tar.jp-tokens-<print>.npz    token counts of the usable samples, and the bad ones with their reasons; valid for one
                                   fingerprint of tokenizer, template, options and source settings, so stages do not overwrite
                                   each other
    X.tar.jp-excluded.json         samples that `data verify --exclude` took out (exclusions.py); their digest is in the name and
                                   the meta data of the tokens file: .jp-tokens-<print>-x<digest>.npz
    X.tar.jp-vq-<print>.npy, .json ids of the pictures and what they were made with (vq_ids.py)

They lie beside the shard, or in $XDG_CACHE_HOME/jp_train/index (default ~/.cache) when its folder is read-only or remote. Each is
written under a temporary name and renamed, so concurrent builders are harmless.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jp_train.data.shards import Shard, ShardMembers, is_url
from jp_train.errors import DataError

FORMAT = 1
"""Raise it when a sidecar's layout changes: older files are then rebuilt."""

_MEMBERS = ".jp-members.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTokens:
    """The tokens sidecar of a shard: G usable samples out of its N.

    `sample` int32 [G]: their numbers in the shard; `tokens`, `short_tokens`, `dropped_tokens`, `short_dropped_tokens` int32 [G];
    `bad`: (key, reason) of the others.
    """

    sample: np.ndarray
    tokens: np.ndarray
    short_tokens: np.ndarray
    dropped_tokens: np.ndarray
    short_dropped_tokens: np.ndarray
    dialogues: int
    bad: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.sample)


def load_members(shard: Shard) -> ShardMembers | None:
    """The members sidecar of a shard, or None when there is none for its size and stamp."""
    loaded = _read(shard, _MEMBERS, _identity(shard))
    if loaded is None:
        return None
    meta, arrays = loaded
    return ShardMembers(
        keys=tuple(_unpack(arrays["keys"])),
        member_start=arrays["member_start"],
        extensions=tuple(meta["extensions"]),
        extension=arrays["extension"],
        offset=arrays["offset"],
        size=arrays["size"],
        ignored=tuple((name, reason) for name, reason in meta["ignored"]),
    )


def has_members(shard: Shard) -> bool:
    """Whether a current members sidecar exists; cheaper than loading it."""
    return _read(shard, _MEMBERS, _identity(shard), arrays=False) is not None


def member_extensions(shard: Shard) -> tuple[str, ...] | None:
    """The file extensions in a shard, from the members sidecar; None when there is no current one. Cheaper than loading it."""
    loaded = _read(shard, _MEMBERS, _identity(shard), arrays=False)
    return None if loaded is None else tuple(loaded[0]["extensions"])


def load_tokens(shard: Shard, fingerprint: str) -> ShardTokens | None:
    """The tokens sidecar of a shard for a fingerprint, or None when there is none that is current."""
    expected = _identity(shard) | {"fingerprint": fingerprint, "excluded": shard.excluded or None}
    loaded = _read(shard, _tokens_suffix(shard, fingerprint), expected)
    if loaded is None:
        return None
    meta, arrays = loaded
    table = arrays["table"]
    return ShardTokens(
        sample=arrays["sample"],
        tokens=table[0],
        short_tokens=table[1],
        dropped_tokens=table[2],
        short_dropped_tokens=table[3],
        dialogues=meta["dialogues"],
        bad=tuple((key, reason) for key, reason in meta["bad"]),
    )


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


def store_tokens(shard: Shard, fingerprint: str, tokens: ShardTokens) -> None:
    """Write the tokens sidecar. Raises DataError when neither place can be written."""
    meta = {"fingerprint": fingerprint, "excluded": shard.excluded or None, "dialogues": tokens.dialogues, "bad": tokens.bad}
    table = np.stack([tokens.tokens, tokens.short_tokens, tokens.dropped_tokens, tokens.short_dropped_tokens])
    _write(shard, _tokens_suffix(shard, fingerprint), _identity(shard) | meta, {"sample": tokens.sample, "table": table})


def _tokens_suffix(shard: Shard, fingerprint: str) -> str:
    """Another name for other exclusions: a run that goes on while samples are excluded keeps reading the table it began with."""
    return f".jp-tokens-{fingerprint[:12]}{f'-x{shard.excluded[:8]}' if shard.excluded else ''}.npz"


def _identity(shard: Shard) -> dict:
    return {"format": FORMAT, "size": shard.size, "stamp": shard.stamp}


def sidecar_places(shard: Shard, suffix: str) -> list[Path]:
    """Where a sidecar may be: beside the shard, then in the cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jp_train" / "index"
    cached = base / hashlib.sha256(shard.path.encode()).hexdigest()[:32] / f"{shard.name}{suffix}"
    return [cached] if is_url(shard.path) else [Path(shard.path + suffix), cached]


def write_sidecar(shard: Shard, suffix: str, write: Callable[[BinaryIO], None]) -> Path:
    """Let `write` fill a sidecar in the first place that can be written: temporary file, fsync, rename. Returns its path.

    Raises DataError when neither place can be written.
    """
    problems = []
    places = sidecar_places(shard, suffix)
    for path in places:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            if path is places[-1]:
                path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return path
        except OSError as error:
            problems.append(str(error))
            with contextlib.suppress(OSError):
                temporary.unlink()
    raise DataError(f"cannot write the index: {'; '.join(problems)}; make the shard's folder or $XDG_CACHE_HOME writable")


def _write(shard: Shard, suffix: str, meta: dict, arrays: Mapping[str, np.ndarray]) -> None:
    blob = np.frombuffer(json.dumps(meta, ensure_ascii=True).encode(), np.uint8)
    write_sidecar(shard, suffix, lambda file: np.savez(file, meta=blob, **arrays))


def _read(shard: Shard, suffix: str, expected: dict, *, arrays: bool = True) -> tuple[dict, dict[str, np.ndarray]] | None:
    for path in sidecar_places(shard, suffix):
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(bytes(file["meta"]))
                if any(meta.get(key) != value for key, value in expected.items()):
                    continue
                return meta, {name: file[name] for name in file.files if arrays and name != "meta"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # absent, or damaged: it is built again
    return None


def _unpack(blob: np.ndarray) -> list[str]:
    text = bytes(blob).decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []

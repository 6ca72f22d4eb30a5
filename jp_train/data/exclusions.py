"""Samples that `jp-train data verify --exclude` took out of a shard: the index leaves them out and the ledger names
them.

    X.tar.jp-excluded.json    {"format", "size", "stamp", "excluded": {kind of source: [[key, fault, reason], ...]}}

The file lies where the sidecars lie and is valid for one size and stamp of the shard: it has no effect once the shard
is written again. A rebuild of the index keeps it. Only faults that decoding an image reveals belong here; the index
detects all others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jp_train.data.shards import Shard
from jp_train.data.sidecar import sidecar_places, write_sidecar
from jp_train.errors import DataError
from jp_train.types import KINDS, Kind

FORMAT = 1

_SUFFIX = ".jp-excluded.json"


@dataclass(frozen=True, slots=True)
class Excluded:
    """Why a sample was taken out: the class of the fault and the reason."""

    fault: str
    reason: str

    @property
    def described(self) -> str:
        """The reason as the index and the ledger give it."""
        return f"excluded by data verify ({self.fault}): {self.reason}"


def with_exclusions(shard: Shard) -> Shard:
    """The shard with the digest of what is taken out of it. Raises DataError for a damaged file of exclusions."""
    exclusions = _load(shard)
    return shard if exclusions is None else replace(shard, excluded=_digest(exclusions))


def excluded_samples(shard: Shard, kind: Kind) -> dict[str, Excluded]:
    """What is taken out of a shard for sources of a kind, by key: exactly what the shard's digest stands for.

    Raises DataError when that changed since the digest was made.
    """
    exclusions = _load(shard) if shard.excluded else None
    if shard.excluded != ("" if exclusions is None else _digest(exclusions)):
        raise DataError(f"the exclusions of shard {shard.path} changed while it was indexed; start again")
    return {} if exclusions is None else exclusions.get(kind, {})


def known_exclusions(shard: Shard, kind: Kind) -> dict[str, Excluded]:
    """What is taken out of a shard for sources of a kind at present, by key."""
    return (_load(shard) or {}).get(kind, {})


def store_exclusions(shard: Shard, kind: Kind, excluded: Mapping[str, Excluded]) -> Path:
    """Set what is taken out of a shard for sources of a kind; other kinds keep theirs. Returns the path that was
    written.

    Raises DataError when no place can be written.
    """
    exclusions = (_load(shard) or {}) | {kind: dict(excluded)}
    document = {
        "format": FORMAT,
        "size": shard.size,
        "stamp": shard.stamp,
        "excluded": {
            str(of_kind): [[key, why.fault, why.reason] for key, why in sorted(exclusions[of_kind].items())]
            for of_kind in exclusions
            if exclusions[of_kind]
        },
    }
    blob = json.dumps(document, indent=1).encode()
    return write_sidecar(shard, _SUFFIX, lambda file: file.write(blob))


def _load(shard: Shard) -> dict[Kind, dict[str, Excluded]] | None:
    """What the newest file that belongs to the shard says; None when there is none, or it takes nothing out."""
    for path in sidecar_places(shard, _SUFFIX):
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != FORMAT or (document["size"], document["stamp"]) != (shard.size, shard.stamp):
                continue
            exclusions = {
                kind: {
                    _text(key): Excluded(str(fault), str(reason))
                    for key, fault, reason in document["excluded"].get(str(kind), ())
                }
                for kind in KINDS
            }
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}: {error}): it names samples to leave out, so it is "
                "not ignored; run `jp-train data verify --exclude` again after deleting it"
            ) from error
        exclusions = {kind: samples for kind, samples in exclusions.items() if samples}
        return exclusions or None
    return None


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key {key!r} is no text")
    return key


def _digest(exclusions: Mapping[Kind, Mapping[str, Excluded]]) -> str:
    """Over kinds and keys only: the wording of a reason does not change what is excluded."""
    parts = [[str(kind), sorted(exclusions[kind])] for kind in KINDS if kind in exclusions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

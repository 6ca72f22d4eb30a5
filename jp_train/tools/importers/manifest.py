"""`manifest.json` in the folder of an import: what is complete on disk, and what it was made from.

It is replaced atomically after every shard. A killed import continues from it: every shard that it names is complete,
and all entries after those are read again, so that no sample is missing or there twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jp_train.data.writer import WrittenShard
from jp_train.errors import ConfigError, DataError
from jp_train.files import write_atomically

NAME, SKIPPED = "manifest.json", "skipped.jsonl"
VERSION = 1

_NAMED = 5
_SKIP, _TAKEN = "skipped:", "taken:"


@dataclass(kw_only=True)
class OutputState:
    """A folder of shards: its absolute path, the complete shards, and the number of the first entry after them."""

    folder: str
    end: int = 0
    shards: list[WrittenShard] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


@dataclass(kw_only=True)
class Manifest:
    """The state of an import. `counts` holds `entries`, `converted`, `skipped:REASON` and, of tars, `taken:ROLE PLACE`
    over the entries before `log_end`, whose skips are the first `log_bytes` bytes of `skipped.jsonl`."""

    format: str
    source: str
    identity: dict[str, str]
    options: dict[str, Any]
    outputs: dict[str, OutputState]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files of the source that are not read, by the endings of their names."""
    counts: dict[str, int] = field(default_factory=Counter)
    log_end: int = 0
    log_bytes: int = 0
    complete: bool = False

    def count_skip(self, reason: str) -> None:
        self.counts[_SKIP + reason] += 1

    def count_taken(self, role: str, place: str, count: int) -> None:
        self.counts[f"{_TAKEN}{role} {place}"] += count

    @property
    def skipped(self) -> dict[str, int]:
        """How many entries were skipped, by reason."""
        return self._counted(_SKIP)

    @property
    def taken(self) -> dict[tuple[str, str], int]:
        """How many samples of tars have which text at which place."""
        names = ((name.split(" ", 1), count) for name, count in self._counted(_TAKEN).items())
        return {(role, place): count for (role, place), count in names}

    def _counted(self, prefix: str) -> dict[str, int]:
        counts = sorted(self.counts.items())
        return {name.removeprefix(prefix): count for name, count in counts if name.startswith(prefix)}

    @property
    def wrote_nothing(self) -> bool:
        """Whether there is no shard yet: another import may take the folder."""
        return not any(output.shards for output in self.outputs.values())

    def store(self, folder: Path) -> None:
        """Write it into `folder`. Raises DataError when that fails."""
        try:
            write_atomically(
                folder / NAME,
                json.dumps({"version": VERSION, **asdict(self), "counts": dict(self.counts)}, indent=1) + "\n",
            )
        except OSError as error:
            raise DataError(
                f"cannot write {folder / NAME}: {error}; free space or correct the folder, "
                "then run the same command again"
            ) from error


class SkipLog:
    """`skipped.jsonl` of a folder, one object a line, cut back on opening to what the manifest counts.

    Raises:
        DataError: when the file is shorter than that, or cannot be written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._path, self._manifest = folder / SKIPPED, manifest
        with self._explained():
            self._file: BinaryIO = open(self._path, "ab")  # noqa: SIM115 - it stays open over many calls
            if self._file.tell() < manifest.log_bytes:
                self._file.close()
                raise DataError(
                    f"{self._path} is shorter than {manifest.log_bytes} bytes: it was changed; "
                    "import into another folder"
                )
            self._file.truncate(manifest.log_bytes)
            self._file.seek(0, os.SEEK_END)

    def write(self, **line: Any) -> None:
        with self._explained():
            self._file.write(json.dumps(line).encode() + b"\n")

    def sync(self, end: int) -> None:
        """Flush it to the disk, and note in the manifest that it has the skips of every entry before `end`."""
        with self._explained():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._manifest.log_bytes = self._file.tell()
        self._manifest.log_end = max(self._manifest.log_end, end)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what matters was synced; the rest is written again on resume
            self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error}; free space, then run the same command again"
            ) from error


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none. Raises DataError for one that cannot be read."""
    path = folder / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("version")
        if version != VERSION:
            raise ValueError(f"version {version}, expected {VERSION}")
        outputs = {
            name: OutputState(
                folder=output["folder"], end=output["end"], shards=[WrittenShard(**shard) for shard in output["shards"]]
            )
            for name, output in value.pop("outputs").items()
        }
        return Manifest(**{**value, "counts": Counter(value["counts"])}, outputs=outputs)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); import into another folder, or remove this one") from None


def resume_or_start(folder: Path, new: Manifest) -> Manifest:
    """The manifest to go on from: the one in `folder` where it belongs to the same source and options, else `new`;
    also `new` where an import of something else stopped before its first shard.

    Raises:
        ConfigError: when the source or an option changed (the message has both values), or the folder holds shards of
            other origin.
        DataError: when a shard that the manifest names is gone or has another size.
    """
    existing = load_manifest(folder)
    changes = [] if existing is None else _changes(existing, new)
    if existing is None or (changes and existing.wrote_nothing):
        for output in new.outputs.values():
            foreign = sorted(path.name for path in Path(output.folder).glob("*.tar"))
            if foreign:
                raise ConfigError(
                    f"{output.folder} holds shards ({foreign[0]}) that no {NAME} of an import names: they would mix; "
                    "choose an empty folder, or delete this one if an import that you have deleted wrote it"
                )
        return new
    if changes:
        more = f"; and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
        written = " and ".join(output.folder for output in existing.outputs.values())
        raise ConfigError(
            f"{folder} holds an import {'that is complete' if existing.complete else 'that was interrupted'}, "
            f"but of something else: {'; '.join(changes[:_NAMED])}{more}. "
            f"Restore what changed to go on, import into another folder, or delete what it wrote: {written}"
        )
    for output in existing.outputs.values():
        for shard in output.shards:
            path = Path(output.folder) / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                raise DataError(
                    f"shard {path} {'is gone' if size is None else f'has {size:,} bytes'}, "
                    f"{NAME} says {shard.size:,} bytes: it was changed "
                    "after it was written; restore it, or import into another folder"
                )
    return existing


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock on `folder`, made if needed; it ends with the process. Raises ConfigError when another import has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"OUT {folder}: {error}; name a folder that can be written") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another import is writing {folder}: wait for it, or stop it first") from None
        yield
    finally:
        os.close(descriptor)


def _changes(then: Manifest, now: Manifest) -> list[str]:
    folders = ({name: output.folder for name, output in manifest.outputs.items()} for manifest in (then, now))
    return [
        *_differences("", {"format": then.format}, {"format": now.format}),
        *_differences("source: ", then.identity, now.identity),
        *_differences("option ", then.options, now.options),
        *_differences("folder of ", *folders),
    ]


def _differences(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{what}{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]

"""An existing WebDataset: every shard validated and its members indexed, in place where it can be.

Plain tars (local or http) stay where they are. Compressed ones, and those that a command writes (`pipe:`), are copied
into OUT as plain shards, byte for byte after decompression: the loader reads byte ranges. A command is run without a
shell, and only when it is allowed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import braceexpand

from jp_train.config.choices import Crop, SourceKind
from jp_train.config.schema import DataConfig, SourceConfig
from jp_train.data.field_map import IMAGE_EXTENSIONS, VQ_EXTENSION, field_map
from jp_train.data.image import decode_rgb
from jp_train.data.sample_fields import read_fields
from jp_train.data.shards import Shard, ShardMembers, ShardReader, expand_shards, is_url, scan_members
from jp_train.data.sidecar import load_members, store_members
from jp_train.data.writer import SHARD_NAME, WrittenShard
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.files import replacing
from jp_train.tools.importers.compression import DAMAGE, compression, decompressed, zstandard
from jp_train.tools.importers.files import file_identity
from jp_train.tools.importers.samples import read_texts
from jp_train.types import Kind, RawSample

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIPE = "pipe:"
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SHELL = ("|", "||", "&&", ";", "&", "<", ">", ">>", "2>")
_BLOCK = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSource:
    """The tars that SOURCE names: paths, URLs or `pipe:` commands; `copies` says that they have to be written again
    as plain shards; `spec` names them in a recipe where they stay."""

    names: tuple[str, ...]
    copies: bool
    spec: str
    identity: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTar:
    """What one tar holds: its size, entries (samples and stray files), the bad ones of them as (key, reason,
    message), how many others have which text at which place, as `fields` of a recipe names both, and the copy where
    one was written."""

    size: int
    entries: int
    bad: tuple[tuple[str, str, str], ...]
    taken: dict[tuple[str, str], int]
    written: WrittenShard | None = None


def find_tars(source: str, *, allow_pipe: bool) -> TarSource:
    """The tars of a SOURCE: shards as a recipe names them, a folder (of `*.tar`, or of compressed tars), or
    `pipe:COMMAND` with braces.

    Raises:
        ConfigError: for a `pipe:` that is not allowed or needs a shell, zstd without zstandard, or nothing by that
            name.
        DataError: for a tar that cannot be reached.
    """
    try:
        parts = list(braceexpand.braceexpand(source))
    except ValueError as error:  # UnbalancedBracesError, which the types of braceexpand lack
        raise ConfigError(f"SOURCE {source!r}: {error}; write ranges as {{000..127}}") from None
    if any(part.startswith(PIPE) for part in parts):
        if not all(part.startswith(PIPE) for part in parts):
            raise ConfigError(f"SOURCE {source!r} mixes commands and paths; import them one after the other")
        if not allow_pipe:
            raise ConfigError(f"SOURCE {source!r} runs commands on this machine: give --allow-pipe if you trust them")
        for part in parts:
            command_words(part)
        return TarSource(names=tuple(parts), copies=True, spec=source, identity={part: "command" for part in parts})
    folder = Path(os.path.expanduser(source))
    names = (
        sorted(str(path.absolute()) for path in folder.iterdir() if path.name.lower().endswith(_COMPRESSED_NAMES))
        if folder.is_dir()
        else []
    )
    plain = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if names and plain:
        raise ConfigError(
            f"folder {folder} holds plain tars ({plain[0].name}) and compressed ones ({Path(names[0]).name}): "
            "name one sort, for example "
            f"'{folder}/*.tar'"
        )
    if folder.is_dir() and not names and not plain:
        raise ConfigError(f"folder {folder} holds no *.tar and no compressed tar ({', '.join(_COMPRESSED_NAMES)})")
    names = names or expand_shards(source)
    with contextlib.closing(ShardReader()) as reader:
        shards = [reader.stat(name) for name in names]
        kinds = Counter(compression(reader.read(shard, 0, min(4, shard.size))) for shard in shards)
    if kinds["zstd"]:
        zstandard()
    copies = kinds[""] < len(names)
    identity = {  # only copies are resumed by it: tars that stay are not worth reading twice
        shard.path: file_identity(Path(shard.path))
        if copies and not is_url(shard.path)
        else f"{shard.size:,} bytes, {shard.stamp}"
        for shard in shards
    }
    spec = source if is_url(source) else os.path.abspath(os.path.expanduser(source))
    return TarSource(names=tuple(names), copies=copies, spec=spec, identity=identity)


def taken_fields(kind: Kind, taken: Collection[tuple[str, str]]) -> dict[str, str]:
    """`fields` of a recipe for (role, place) pairs, in the order in which training looks for them."""
    places = field_map(SourceConfig(kind=SourceKind(kind.value))).places
    specs = {role: [place.spec for place in of_role if (role, place.spec) in taken] for role, of_role in places.items()}
    return {role: ";".join(names) for role, names in specs.items() if names}


def command_words(part: str) -> list[str]:
    """The words of a `pipe:` command. Raises ConfigError for one that is empty or needs a shell."""
    try:
        words = shlex.split(part.removeprefix(PIPE))
    except ValueError as error:
        raise ConfigError(f"{part!r}: {error}") from None
    if not words or any(word in _SHELL for word in words):
        raise ConfigError(
            f"{part!r} {'names no command' if not words else 'needs a shell (a pipe, redirection or list)'}: "
            "jp-train runs one program without a "
            "shell; put it into a script and name the script"
        )
    return words


def check_tar(name: str, kind: Kind) -> CheckedTar:
    """Validate a tar in place and write its members sidecar. Raises DataError for a corrupt one."""
    with contextlib.closing(ShardReader()) as reader:
        return _check(reader.stat(name), kind, reader)


def copy_tar(name: str, folder: Path, number: int, kind: Kind) -> CheckedTar:
    """Write the tar `name` (path, URL or command) as the plain shard `number` of a folder, and validate it.

    Raises:
        DataError: for a truncated or corrupt tar, a failing command, or a shard that cannot be written; none is left.
    """
    path = folder / SHARD_NAME.format(number)
    try:
        with replacing(path) as file:
            with _stream(name) as stream:
                digest = _copy(name, stream, file)
            file.flush()
            temporary = str(file.name)
            with contextlib.closing(ShardReader()) as reader:
                try:
                    shard = reader.stat(temporary)
                    members = scan_members(shard, reader)
                except DataError as error:
                    raise DataError(f"{name}: {str(error).replace(temporary, 'its content')}") from None
    except OSError as error:
        raise DataError(
            f"cannot write shard {path} from {name}: {error}; correct that, then run the same command again: it resumes"
        ) from error
    with contextlib.closing(ShardReader()) as reader:
        checked = _check(Shard(path=str(path), size=shard.size, stamp=shard.stamp), kind, reader, members)
    written = WrittenShard(name=path.name, size=shard.size, samples=len(members.keys), sha256=digest)
    return replace(checked, written=written)


def look_into(name: str, kind: Kind, most: int) -> tuple[CheckedTar, list[tuple[str, str, str]]]:
    """What the first samples of a tar hold, and (key, reason, message) of their images that cannot be used; nothing is
    written. Raises DataError for a tar that is corrupt up to there."""
    fields = field_map(SourceConfig(kind=SourceKind(kind.value)))
    images: list[tuple[str, str, str]] = []
    with contextlib.closing(ShardReader()) as reader:
        shard = reader.stat(name)
        members = scan_members(shard, reader, most)
        for number, key in enumerate(members.keys):
            with contextlib.suppress(SkipSample):  # which `_judged` names
                raw = read_fields(shard, members, number, fields, Crop.centre, reader, "")
                images += [(key, *fault) for fault in _image_faults(raw)][:1]
        return _judged(shard, members, kind, reader), images


def _image_faults(raw: RawSample) -> Iterator[tuple[str, str]]:
    for extension, data in raw.fields.items():
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            try:
                decode_rgb(data, DataConfig.max_image_pixels)
            except SkipSample as skip:
                yield skip.fault, str(skip)


def _check(shard: Shard, kind: Kind, reader: ShardReader, members: ShardMembers | None = None) -> CheckedTar:
    members = members or load_members(shard) or scan_members(shard, reader)
    store_members(shard, members)
    return _judged(shard, members, kind, reader)


def _judged(shard: Shard, members: ShardMembers, kind: Kind, reader: ShardReader) -> CheckedTar:
    bad = [(name, "bad_record", reason) for name, reason in members.ignored]
    fields = field_map(SourceConfig(kind=SourceKind(kind.value)))
    taken: Counter[tuple[str, str]] = Counter()
    for number, key in enumerate(members.keys):
        try:
            raw = read_fields(shard, members, number, fields, Crop.centre, reader, "", images=False)
            # Stored ids pass as an image: how many a sample must have depends on the model, and training checks it.
            files = {"png" if extension == VQ_EXTENSION else extension: data for extension, data in raw.fields.items()}
            texts = read_texts(replace(raw, fields=files), fields)
            taken.update((role, place.spec) for role, place in texts.taken.items())
        except SkipSample as skip:
            bad.append((key, skip.fault, str(skip)))
    entries = len(members.keys) + len(members.ignored)
    return CheckedTar(size=shard.size, entries=entries, bad=tuple(bad), taken=dict(taken))


@contextlib.contextmanager
def _stream(name: str) -> Iterator[IO[bytes]]:
    if not name.startswith(PIPE):
        with contextlib.closing(ShardReader()) as reader:
            yield io.BufferedReader(_Ranges(reader, reader.stat(name)), _BLOCK)
        return
    words = command_words(name)
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            raise DataError(f"{name!r}: the command cannot be started: {error}") from None
        with process:
            try:
                assert process.stdout is not None
                yield process.stdout
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(max(0, errors.seek(0, io.SEEK_END) - 500))
            output = errors.read().decode(errors="replace").strip()
            raise DataError(f"{name!r} ended with status {process.returncode}: {output or 'it printed nothing'}")


class _Ranges(io.RawIOBase):
    """A shard as a stream of byte ranges, with the reader's retries."""

    def __init__(self, reader: ShardReader, shard: Shard) -> None:
        self._reader, self._shard, self._at = reader, shard, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        size = min(len(view), self._shard.size - self._at)
        view[:size] = self._reader.read(self._shard, self._at, size) if size else b""
        self._at += size
        return size


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._head[: len(view)] or self._stream.read(len(view))
        self._head = self._head[len(data) :] if self._head else b""
        view[: len(data)] = data
        return len(data)


def _copy(name: str, stream: IO[bytes], file: BinaryIO) -> str:
    """Decompress a stream into a file; returns the SHA-256 of what was written."""
    head = stream.read(4)
    kind = compression(head)
    plain = decompressed(io.BufferedReader(_Rejoined(head, stream), _BLOCK), kind)
    digest = hashlib.sha256()
    while True:
        try:
            block = plain.read(_BLOCK)
        except DAMAGE as error:
            raise DataError(
                f"{name}: the {kind or 'tar'} stream is truncated or corrupt: {error}; download it again"
            ) from None
        if not block:
            return digest.hexdigest()
        file.write(block)
        digest.update(block)

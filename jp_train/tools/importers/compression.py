"""Compressed files, known by their first bytes, as plain streams."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jp_train.data.tar_headers import COMPRESSIONS
from jp_train.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a stream that is cut short or damaged raises."""

_ZSTD_BLOCK = 16 << 10


def compression(head: bytes) -> str:
    """The name of the compression of a file that starts with these bytes (4 or more), empty for none."""
    return next((name for magic, name in COMPRESSIONS if head.startswith(magic)), "")


def decompressed(stream: IO[bytes], kind: str) -> IO[bytes]:
    """The plain bytes of a stream of this compression (`compression`). Raises ConfigError for zstd without
    zstandard; its `read` raises DAMAGE."""
    plain: IO[bytes] = _DECOMPRESSORS[kind](stream)
    return plain


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file as it lies on disk, whose `tell()` is how far it has been read, and its plain bytes."""
    with open(path, "rb") as file:
        kind = compression(file.read(4))
        file.seek(0)
        yield file, decompressed(file, kind)


def zstandard() -> Any:
    """The module zstandard. Raises ConfigError where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "zstd needs zstandard, which is not installed: pip install 'jp_train[zstd]' (or pip install zstandard)"
        ) from None
    return zstandard


class _ZstdFrames(io.RawIOBase):
    """The frames of a zstd stream one after the other; zstandard's own reader takes a frame that is cut short for the
    end."""

    def __init__(self, stream: IO[bytes]) -> None:
        module = zstandard()
        self._stream, self._error = stream, module.ZstdError
        self._new_frame = module.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._plain:
            self._packed = self._packed or self._stream.read(_ZSTD_BLOCK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._plain = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise OSError(f"zstd: {error}") from None
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(view), len(self._plain))
        view[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "": lambda stream: stream,
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": lambda stream: io.BufferedReader(_ZstdFrames(stream), 1 << 20),
}

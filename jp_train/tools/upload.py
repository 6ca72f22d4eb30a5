"""`--upload URL`: copy what a command wrote into an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from jp_train.data.stores import STORES, StoreRanges, scheme_of
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine

LAST = ("config.json", "manifest.json")
"""What a reader looks for first is there last."""
TRIES = 10
"""Of each request of an upload."""


class Upload:
    """Copies folders to `url`, each under its own name. Made before the work whose result it copies, so that a store
    that cannot be reached is known beforehand.

    Raises ConfigError for a URL that is not one of a store (the hub has its own `hf upload`), DataError when the store
    cannot be listed.
    """

    def __init__(self, url: str) -> None:
        if scheme_of(url) not in STORES:
            raise ConfigError(
                f"--upload {url!r}: expected {', '.join(f'{scheme}://' for scheme in STORES)}BUCKET/FOLDER"
            )
        self._url = url.rstrip("/")
        self._store = StoreRanges(tries=TRIES)
        try:
            self._store.expand(f"{self._url}/")
        except OSError as error:
            raise DataError(f"--upload {url}: the store cannot be listed: {error}") from None

    def copy(self, folder: Path, stream: TextIO | None = None) -> str:
        """Copy the files of a folder, but for hidden ones and the index beside shards; returns the address of the copy.
        Objects of the same name are replaced. Raises DataError when the store refuses one."""
        address = f"{self._url}/{folder.absolute().name}"
        files = [
            path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_ours(path.relative_to(folder))
        ]
        files.sort(key=lambda path: path.name in LAST)
        total, done, line = sum(path.stat().st_size for path in files), 0, ProgressLine("upload", stream)
        for number, path in enumerate(files, start=1):
            try:
                self._store.write(path, f"{address}/{path.relative_to(folder).as_posix()}")
            except OSError as error:
                raise DataError(
                    f"cannot copy {path} to {address}: {error}. What was written stays in {folder.absolute()}"
                ) from None
            done += path.stat().st_size
            line.show(done, total, f"{number:,} of {len(files):,} files")
        return address


def _is_ours(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts) or ".jp-" in path.name

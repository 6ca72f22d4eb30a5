"""Writing files that a reader, a kill or a full disk may meet at any moment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_WAITING = 64 << 20
"""Bytes of lines kept while the disk takes none: days of metrics."""


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old file or the new one, and after a power cut there is no third."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Appender:
    """Lines at the end of a file, each on its way to the disk at once. On a disk that takes none (full, read-only) they
    wait in memory, in order, and
    go with the next one: what stops a run then is `checkpoint.on_error`, not its log. More than MAX_WAITING bytes
    raise the error."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError:
            if len(self._waiting) > MAX_WAITING:
                raise

    def close(self) -> None:
        self.write("")
        self._file.close()


def lines_until(path: Path, last_step: int | None) -> list[str]:
    """The whole lines of a metrics file whose step is at most `last_step`; of one step's lines the last."""
    kept: dict[int, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if last_step is not None and step <= last_step:
                kept[step] = line if line.endswith("\n") else line + "\n"
    return list(kept.values())


def drop_later_lines(path: Path, last_step: int) -> None:
    """Take the lines of steps after `last_step` out of a JSON-lines file (a resumed run writes them again); lines
    without a step stay."""
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                step = json.loads(line).get("step")
            except (ValueError, AttributeError):
                continue
            if step is None or step <= last_step:
                kept.append(line if line.endswith("\n") else line + "\n")
    write_atomically(path, "".join(kept))


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, at any depth: JSON has no number for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value

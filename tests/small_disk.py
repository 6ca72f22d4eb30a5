"""A real file system of a few MiB, for what happens when a disk is full or read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jp_train.engine.checkpoint.disk import free_bytes


def mount(place: Path, size: str) -> str:
    """Mount one of `size` (as tmpfs takes it: 8m) at a folder; why that cannot be done here, empty when it is done."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() or "mount failed" if done.returncode else ""


@contextmanager
def mounted(place: Path, size: str) -> Iterator[str]:
    """`mount` for the duration of a block; gives its problem."""
    place.mkdir(parents=True, exist_ok=True)
    problem = mount(place, size)
    try:
        yield problem
    finally:
        if not problem:
            subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Leave so many bytes free; the file that takes the rest."""
    filler = place / "filler"
    filler.write_bytes(b"\0" * max(0, free_bytes(place) - leave))
    return filler

"""Is there room for a checkpoint, and what to say when there is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from jp_train.errors import CheckpointError

SPARE = 1 << 20
"""Bytes left for metrics, events and the file system's own blocks."""
ABANDONED = "abandoned"
"""Folder of a run for what it went back from (rollback.py)."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def require_space(folder: Path, needed: int, what: str, damaged: Collection[str] = ()) -> None:
    """Raise CheckpointError when fewer than `needed` bytes are free where `folder` lies. (A quota shows only when
    writing fails.)

    `damaged` names checkpoints there that are worth nothing: the first to go.
    """
    free = free_bytes(folder)
    if free < needed + SPARE:
        raise CheckpointError(
            f"{what} needs {gib(needed)}, and only {gib(free)} are free at {folder}. "
            f"{space_advice(folder, needed + SPARE - free, damaged)}"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def with_advice(error: OSError, folder: Path, damaged: Collection[str] = ()) -> str:
    """The error with what can be done about it."""
    if error.errno in FULL:
        return f"{error}. {space_advice(folder, damaged=damaged)}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error}. Make {folder} writable again, or resume with a run_dir that is"
    if error.errno == errno.ENOENT:
        return f"{error}. {folder} was deleted or moved while the run wrote to it"
    return str(error)


def space_advice(folder: Path, missing: int = 0, damaged: Collection[str] = ()) -> str:
    """What to delete: damaged checkpoints and what the run went back from, then old ones but the newest whole one, else
    something that is not the run's."""
    sizes = [(path, folder_bytes(path)) for path in sorted(folder.glob("step_*"))] if folder.is_dir() else []
    at_least = f" at least {gib(missing)}" if missing else " space"
    bad = _listed([(path, size) for path, size in sizes if path.name in damaged])
    sizes = [(path, size) for path, size in sizes if path.name not in damaged]
    aside = folder.parent / ABANDONED
    worthless = [f"what is damaged: {bad}"] if bad else []
    if aside.is_dir():
        worthless.append(f"what the run went back from: {aside} ({gib(folder_bytes(aside))})")
    first = f"delete {'; '.join(worthless)}" if worthless else ""
    if len(sizes) > 1:
        then = (
            f"{'; then ' if first else 'delete '}old checkpoints, but not the newest{' whole one' if bad else ''} "
            f"({sizes[-1][0].name})"
        )
        return f"Free{at_least}: {first}{then}: {_listed(sizes[:-1])}; then lower checkpoint.keep_last"
    kept = f"; {_listed(sizes)} is the only complete checkpoint: keep it" if sizes else ""
    if first:
        return f"Free{at_least}: {first}{kept}"
    return f"Free{at_least} on that file system (old runs, exports), or use a run_dir on a larger one{kept}"


def _listed(sizes: list[tuple[Path, int]]) -> str:
    return ", ".join(f"{path.name} ({gib(size)})" for path, size in sizes)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 for what vanishes meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def gib(size: int) -> str:
    """`3.21 GiB`, or MiB for small sizes."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

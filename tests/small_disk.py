"""A real file system of a few MiB, for what happens when a disk is full, read-only or slow."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jp_train.engine.checkpoint.disk import free_bytes


def mount(place: Path, size: str) -> str:
    """Mount one of `size` (as tmpfs takes it: 8m) at a folder; why that cannot be done here, empty when it is done."""
    return _problem_of(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)])


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


class ThrottledDisk:
    """An ext4 file system in a file, whose speed can be limited while it is used: by the kernel's block throttle, for
    a loop device. `problem`: why that cannot be done here, empty when it can; then it is mounted at `place`."""

    THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")

    def __init__(self, place: Path, image: Path, size: int) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(size)
        self._device = ""
        self.problem = _problem_of(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)]) or _problem_of(
            ["mount", "-o", "loop", str(image), str(place)]
        )
        if not self.problem:
            device = os.stat(place).st_dev
            self._device = f"{os.major(device)}:{os.minor(device)}"
            if self.THROTTLE.exists():
                self.limit(0)

    @property
    def can_be_slow(self) -> bool:
        return bool(self._device) and self.THROTTLE.exists()

    def limit(self, bytes_per_s: int) -> None:
        """Write no faster from now on; 0: as fast as it can."""
        self.THROTTLE.write_text(f"{self._device} {bytes_per_s}\n")


def _problem_of(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"not installed: {argv[0]}"
    return (done.stderr.strip() or f"{argv[0]} failed") if done.returncode else ""

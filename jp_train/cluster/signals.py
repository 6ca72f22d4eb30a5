"""Finds and signals the processes of one launch on this host; also run on the hosts of a hostfile as `python -m
jp_train.cluster.signals ID SIGNAL`.

A launch marks all its processes by an environment variable, so that no other job of the same user is ever touched:
DeepSpeed's own clean-up kills by the text of the command line, which every DeepSpeed job of that Python shares
(docs/zero3.md, rule 8). Linux only (/proc). Standard library only: it starts in milliseconds on every host.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from jp_train.run.lock import LAUNCH_ID

REACHED = "jp_train: reached"
SUPERVISOR = [b"-u", b"-m", b"jp_train.cluster.rank"]
"""First arguments of the process that has a rank for its child. Launchers have the same words further back in
theirs."""


def launched_processes(launch_id: str, *, proc: Path = Path("/proc")) -> list[int]:
    """Every process of the launch on this host but this one: runner, launcher, ranks with their supervisors and
    loader workers."""
    mark = f"{LAUNCH_ID}={launch_id}".encode()
    others = [entry for entry in proc.iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()]
    return sorted(int(entry.name) for entry in others if mark in read_proc(entry / "environ").split(b"\0"))


def rank_processes(launch_id: str, *, proc: Path = Path("/proc")) -> list[int]:
    """The ranks among them: children of `jp_train.cluster.rank`. Their loader workers, which die of a signal, are
    not."""
    ranks = []
    for pid in launched_processes(launch_id, proc=proc):
        parent = re.search(rb"^PPid:\s+(\d+)", read_proc(proc / str(pid) / "status"), re.MULTILINE)
        if parent and read_proc(proc / parent[1].decode() / "cmdline").split(b"\0")[1:4] == SUPERVISOR:
            ranks.append(pid)
    return ranks


def send(pids: list[int], number: int) -> list[int]:
    """Send one signal to each process at the same time (DeepSpeed's launcher waits for each rank's end in turn).
    Returns those that were alive."""
    reached = []
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        reached.append(pid)
    return reached


def main(arguments: list[str]) -> int:
    """`ID NUMBER`: ranks get the signal; SIGKILL goes to every process of the launch, and 0 counts them all. Prints
    how many there were."""
    launch_id, number = arguments[0], int(arguments[1])
    pids = launched_processes(launch_id) if number in (0, signal.SIGKILL) else rank_processes(launch_id)
    print(f"{REACHED} {len(send(pids, number))} processes")
    return 0


def reached(answer: str) -> int | None:
    """How many processes `main` found, from what it printed; None from anything else (a host's shell may print
    greetings)."""
    match = re.search(rf"^{REACHED} (\d+) processes$", answer, re.MULTILINE)
    return int(match[1]) if match else None


def read_proc(path: Path) -> bytes:
    """A file of /proc; empty where the process is gone or belongs to another user."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

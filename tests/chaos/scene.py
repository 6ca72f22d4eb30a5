"""One life of a run while it is being disturbed: what a fault may look at and touch. Nothing here asks jp_train how
it is doing: files only."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
BEGINS = ("start", "resume")
"""Events, one of which a run writes when it begins."""


class MissedError(Exception):
    """The moment of the fault did not come, or there is nothing to harm: it was not tried."""


class HungError(AssertionError):
    """Neither the awaited moment nor the end of the ranks came in time."""


@dataclass
class Expectation:
    """How a life should end. `codes`: exit statuses allowed for ranks that were not killed, besides 0 (none: the
    fault is survived within the life); `killed`: the ranks that were; `saved`: nothing may be lost, the last step is
    in a checkpoint; `named`: a pattern of the cause that the ranks' output must hold; `refused`: 0 is wrong, too."""

    codes: tuple[int, ...] = ()
    killed: tuple[int, ...] = ()
    saved: bool = False
    named: str = ""
    refused: bool = False


@dataclass
class Scene:
    """`run_dir`, `data` and `small_disk` (None: no privilege to mount one) as paths; `pids` of the ranks while they
    run."""

    rng: random.Random
    run_dir: Path
    data: Path
    small_disk: Path | None
    world: int
    steps: int
    pids: list[int] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    """Configuration changes for this life."""
    clean_up: list[Callable[[], None]] = field(default_factory=list)
    """Called when the ranks have ended, last first."""
    harmed: dict[str, int] = field(default_factory=dict)
    """Checkpoints that were damaged and lie there still: their names, and the inodes of the folders."""
    events_before: int = 0
    """Events that earlier lives wrote."""
    saves_before: set[tuple[str, int]] = field(default_factory=set)
    """Unfinished saves that lay there when this life began."""
    problems: list[str] = field(default_factory=list)
    """What a fault saw itself in this life that does not hold."""
    patience_s: float = PATIENCE_S
    """A life in which the awaited moment does not come within this time counts as hung."""

    def new_life(self) -> None:
        """Forget what belonged to the life before."""
        self.pids, self.changes, self.clean_up, self.problems = [], {}, [], []
        self.events_before = len(list(self.events()))

    def step(self) -> int:
        """The last completed step in metrics.jsonl."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
        return 0

    def begun(self) -> bool:
        """Whether this life is past its start: the signal handlers are installed and the data position is known."""
        return any(event["event"] in BEGINS for event in list(self.events())[self.events_before :])

    def trained(self) -> bool:
        """Whether this life has completed a step: before, a rank that gets a stop signal may have nothing to save."""
        starts = [event["step"] for event in list(self.events())[self.events_before :] if event["event"] in BEGINS]
        return bool(starts) and self.step() > starts[-1]

    def running(self) -> bool:
        """Whether every rank is alive (one that was killed, or has ended but is not reaped, is not)."""
        return all(state(pid) not in ("Z", "X", "") for pid in self.pids)

    def wait(self, condition: Callable[[], bool], poll_s: float = 0.005) -> None:
        """Until `condition` holds; raises MissedError when a rank ends first, HungError when nothing comes."""
        deadline = time.monotonic() + self.patience_s
        while not condition():
            if not self.running():
                raise MissedError
            if time.monotonic() > deadline:
                raise HungError(f"waited {self.patience_s:.0f} s at step {self.step()}")
            time.sleep(poll_s)

    def steps_on(self, low: int, high: int) -> None:
        """Until a random number of further steps is done; with `low` above 0 not before the run has begun."""
        if low:
            self.wait(self.begun, poll_s=0.02)
        goal = min(self.step() + self.rng.randint(low, high), self.steps - 1)
        self.wait(lambda: self.step() >= goal, poll_s=0.02)

    def signal(self, ranks: list[int], number: signal.Signals) -> None:
        for rank in ranks:
            if state(self.pids[rank]) not in ("Z", "X", ""):
                os.kill(self.pids[rank], number)

    def data_workers(self) -> list[int]:
        """Process ids of the loader workers of all ranks: descendants of the ranks that hold a shard open or wait
        for orders."""
        return [
            pid
            for rank in self.pids
            for pid in descendants(rank)
            if "resource_tracker" not in command(pid) and not is_server(pid)
        ]

    def complete_checkpoints(self) -> list[Path]:
        """Folders that a save has finished, oldest first."""
        return sorted(
            path for path in (self.run_dir / "checkpoints").glob("step_*") if (path / "manifest.json").is_file()
        )

    def sound_checkpoints(self) -> list[Path]:
        """Those of them that nobody damaged (or that a later save has replaced)."""
        return [path for path in self.complete_checkpoints() if self.harmed.get(path.name) != path.stat().st_ino]

    def saving(self) -> bool:
        """Whether this life has begun a save and not finished it."""
        return bool(self.unfinished_saves() - self.saves_before)

    def unfinished_saves(self) -> set[tuple[str, int]]:
        """Names and times."""
        saves = set()
        for path in (self.run_dir / "checkpoints").glob(".saving_*"):
            with contextlib.suppress(FileNotFoundError):
                saves.add((path.name, path.stat().st_mtime_ns))
        return saves

    def events(self) -> Iterator[dict[str, Any]]:
        try:
            lines = (self.run_dir / "events.jsonl").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def state(pid: int) -> str:
    """The letter of /proc/PID/stat, empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(pid: int) -> list[int]:
    """Children, grandchildren, ... of a process."""
    processes: list[int] = []
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return processes
    for child in children:
        processes += [child, *descendants(child)]
    return processes


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_server(pid: int) -> bool:
    """Whether a process is a fork server: it has children of its own."""
    return bool(descendants(pid))

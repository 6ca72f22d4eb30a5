"""The files by which ranks see each other when no collective works any more.

    RUN_DIR/heartbeats/rank_0000.json   where a rank stands, replaced every few seconds by its watchdog
    RUN_DIR/heartbeats/request.json     a rank asks all others for their stacks and their last modules
    RUN_DIR/heartbeats/verdict.json     why the run is over: every rank that sees it ends
    RUN_DIR/stacks/rank_0000_step_7.txt Python stacks of a rank's threads

Every object carries the `attempt`, so that nothing of an earlier start is believed. Files are replaced atomically and
not synced: a stale one after a power cut harms nobody. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jp_train.files import write_atomically

FOLDER = "heartbeats"
STACKS = "stacks"
REQUEST = "request.json"
END_FILE = "verdict.json"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where one rank stands. `beat` counts the rank's writes, `progress` what its training thread did; neither goes
    back within an attempt."""

    attempt: str
    rank: int
    pid: int
    host: str
    beat: int
    time: float
    """Seconds since 1970, for people: no decision compares clocks of two hosts."""
    monotonic: float
    step: int
    phase: str
    micro_batch: int = -1
    module: str = ""
    entered: int = 0
    signature: int = 0
    progress: int = 0
    idle_s: float = 0.0
    """Seconds without progress."""
    limit_s: float | None = None
    """Seconds that this phase may take; None: as long as it likes."""
    answers: str = ""
    """The request that this beat answers; only then the fields below are filled."""
    ended: str = ""
    """The error with which this rank ended, or `no error`; empty while it has not."""
    trail: tuple[str, ...] = ()
    """Names of the last modules entered in this step; the last one is number `entered`."""
    frame: str = ""
    """The innermost line of jp_train that the training thread is in."""
    awaited: dict[str, Any] = field(default_factory=dict)
    """The row that is waited for: {"row", "step", "document", "workers": [{"pid", "state"}]}."""

    @property
    def place(self) -> str:
        """`step 7, forward, micro-batch 0, module model.x (12 entered)`."""
        parts = [f"step {self.step}" if self.step >= 0 else "before the first step", self.phase]
        if self.micro_batch >= 0:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.module and self.entered:
            parts.append(f"last module {self.module} ({self.entered} entered)")
        return ", ".join(parts)


class HeartbeatFolder:
    """Reads and writes the files of one attempt. Every method may raise OSError; a reader of torn or foreign content
    gets None."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self.folder = run_dir / FOLDER
        self.stacks = run_dir / STACKS
        self.attempt = attempt

    def create(self, world: int, *, clear: bool) -> None:
        """Make the folders; `clear` (rank 0) also removes what earlier attempts left."""
        for folder in (self.folder, self.stacks):
            folder.mkdir(parents=True, exist_ok=True)
        if clear:
            known = {rank_name(rank) for rank in range(world)}
            for path in self.folder.iterdir():
                # another rank may be about to rename its own
                if path.name not in known and not path.name.startswith("."):
                    path.unlink(missing_ok=True)

    def write_beat(self, beat: Beat) -> None:
        self._replace(rank_name(beat.rank), asdict(beat))

    def read_beat(self, rank: int) -> Beat | None:
        """The rank's newest heartbeat of this attempt, None without one."""
        values = self._read(rank_name(rank))
        return None if values is None else beat_of(values)

    def ask(self, name: str, rank: int, reason: str) -> None:
        """Ask every rank for stacks and last modules."""
        self._replace(REQUEST, {"attempt": self.attempt, "name": name, "rank": rank, "reason": reason})

    def requested(self) -> str:
        """The name of the newest request, empty without one."""
        request = self._read(REQUEST)
        return str(request.get("name", "")) if request else ""

    def announce_end(self, end: dict[str, Any]) -> None:
        self._replace(END_FILE, {"attempt": self.attempt, **end})

    def announced_end(self) -> dict[str, Any] | None:
        """Why the run is over: {"text", "exit_code", "rank"}; None while it is not."""
        return self._read(END_FILE)

    def stack_file(self, rank: int, step: int) -> Path:
        return self.stacks / f"rank_{rank:04d}_step_{max(0, step)}.txt"

    def _replace(self, name: str, value: dict[str, Any]) -> None:
        writer = str(value["rank"])  # process ids repeat on other hosts
        write_atomically(self.folder / name, json.dumps(value), durable=False, writer=writer)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) and value.get("attempt") == self.attempt else None


def rank_name(rank: int) -> str:
    return f"rank_{rank:04d}.json"


def beat_of(values: dict[str, Any]) -> Beat | None:
    """A heartbeat from its JSON object; None when it is not one."""
    known = {item.name for item in fields(Beat)}
    given: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    try:
        return Beat(**{**given, "trail": tuple(given.get("trail", ()))})
    except TypeError:
        return None

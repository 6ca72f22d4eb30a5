"""The logs of a launch, and the records of how its ranks ended.

    RUN_DIR/logs/20261122-101500-5ac1f00d/node2_rank9.log    all that rank 9 printed; `.log.1`: what came before the
                                                             newest LOG_BYTES
    RUN_DIR/logs/20261122-101500-5ac1f00d/node2_rank9.json   that it started, and how it ended (`RankRecord`)
    RUN_DIR/logs/20261122-101500-5ac1f00d/launcher.log       what the launcher (DeepSpeed's, mpirun, srun) and rank 0
                                                             print on stdout

Every start (a restart too) has its own folder; the newest KEPT_LAUNCHES stay. So the logs of 256 ranks are
bounded, and a rank normally prints a few lines only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from jp_train.files import write_atomically

FOLDER = "logs"
LAUNCHER_LOG = "launcher.log"
KEPT_LAUNCHES = 20
LOG_BYTES = 32 << 20
OVER = ".over_rank"
"""Empty files whose names show which ranks have ended."""
STOPPED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
"""Exit codes of a rank that has obeyed a stop signal."""
TAIL_LINES = 15
"""Last lines of stderr that a record keeps."""
_LAUNCH = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")


def new_launch_id() -> str:
    """A name for one start, which sorts by time: `20261122-101500-5ac1f00d`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"


def log_path(folder: Path, host: str, rank: int) -> Path:
    """The log of a rank in the folder of its launch."""
    return folder / f"{host}_rank{rank}.log"


def open_logs(run_dir: Path, launch_id: str) -> Path:
    """Make the launch's log folder, and remove those of the oldest launches, by the times of the file system: the clock
    that named them may have been set back. Raises OSError."""
    logs = run_dir.absolute() / FOLDER
    folder = logs / launch_id
    folder.mkdir(parents=True, exist_ok=True)
    others = [path for path in logs.iterdir() if _LAUNCH.fullmatch(path.name) and path != folder]
    for old in sorted(others, key=lambda path: (path.stat().st_mtime_ns, path.name))[: 1 - KEPT_LAUNCHES]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class RankRecord:
    """One rank of one launch. `code` is as Popen's: negative for a signal, None while the rank runs. Times in
    seconds since 1970, of its host."""

    rank: int
    host: str
    slot: int
    pid: int
    started: float
    code: int | None = None
    ended: float | None = None
    reason: str = ""
    """Why it was ended, where its supervisor did that."""
    tail: Sequence[str] = ()

    def over(self, code: int, *, reason: str, tail: Sequence[str]) -> RankRecord:
        """The record of the same rank after its end."""
        return replace(self, code=code, ended=time.time(), reason=reason, tail=list(tail))

    def write(self, folder: Path) -> None:
        """Replace the record. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.host}_rank{self.rank}.json"
        write_atomically(path, json.dumps(asdict(self)) + "\n", durable=False)
        if self.code is not None:
            (folder / f"{OVER}{self.rank}").touch()

    @property
    def failed(self) -> bool:
        """It ended, neither as planned nor by a stop signal that it obeyed."""
        return self.code is not None and self.code not in (0, *STOPPED)

    def describe(self) -> str:
        """`rank 9 on node2 (process 4711): killed by SIGKILL`."""
        reason = f"; {self.reason}" if self.reason else ""
        return f"rank {self.rank} on {self.host} (process {self.pid}): {how_it_ended(self.code)}{reason}"


def ranks_over(folder: Path) -> int:
    """How many ranks of a launch have ended: one look at the folder, cheap enough for all ranks at the same time. 0
    where it cannot be read."""
    try:
        return sum(name.startswith(OVER) for name in os.listdir(folder))
    except OSError:
        return 0


SIGNAL_HINTS: Mapping[int, str] = {
    signal.SIGKILL: " (the kernel's out-of-memory killer does this: see dmesg there)",
    signal.SIGABRT: " (abort(): so NCCL ends a process after a failed collective; its log names it, and "
    "RUN_DIR/stacks/nccl_rank_N has each rank's last ones)",
}


def how_it_ended(code: int | None) -> str:
    """A code of Popen in words."""
    if code is None:
        return "still running, as far as is known"
    if code < 0:
        known = -code in {number.value for number in signal.Signals}
        hint = SIGNAL_HINTS.get(-code, "")
        return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}{hint}"
    meaning = {
        0: "done",
        2: "configuration",
        3: "data",
        4: "checkpoint",
        5: "launch, host or another rank",
        130: "SIGINT",
        138: "SIGUSR1",
        143: "SIGTERM",
        255: "ssh: a connection broke off",
    }
    return f"exit code {code} ({meaning.get(code, 'code or device')})"


def read_records(folder: Path | None) -> list[RankRecord]:
    """The records of a launch, by rank; torn or foreign files are left out."""
    records = []
    for path in folder.glob("*_rank*.json") if folder is not None else ():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            records.append(RankRecord(**{item.name: values[item.name] for item in fields(RankRecord)}))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(records, key=lambda record: record.rank)


def culprits(records: Iterable[RankRecord]) -> list[RankRecord]:
    """The ranks that ended in failure, the likely cause first: one that a signal killed, then one with a code that
    names the kind of failure, then the first to end.

    When one rank dies the others fail because it is gone, with exit code 1 or 5.
    """

    def order(record: RankRecord) -> tuple[int, float]:
        assert record.code is not None
        killed = record.code < 0 and record.code != -signal.SIGTERM
        kind = 0 if killed else 1 if record.reason else 2 if record.code in (2, 3, 4) else 3
        return kind, record.ended or 0.0

    return sorted(
        (record for record in records if record.failed or (record.reason and record.code is not None)), key=order
    )

"""How a launch watches a run that its runner does not watch: DeepSpeed's runner waits for ever for a host that stands
still.

Three signs in the run folder are watched: the ranks' records (`records.py`: started, ended), their heartbeats
(`engine/watch/heartbeat.py`: only whether the file changes, as the clocks of hosts differ), and the time since. A host
without a sign of life is queried by ssh, and only the answer decides: it cannot be reached, or nothing of the launch
runs there any more. A run that is only slow goes on. Ranks that stand still on hosts that answer are ended by their
watchdog, with the cause; then no process may outlive them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jp_train.cluster.records import RankRecord, culprits, read_records
from jp_train.cluster.remote import Answer, run_on_hosts
from jp_train.cluster.signals import reached

HEARTBEATS = "heartbeats"
LOOK_S = 2.0
"""Seconds between two looks at the run folder."""
SETTLED_S = 10.0
"""A record that comes within the time stamps' resolution of the one before does not change the folder's: so long
after a change all are read again anyway."""
REREAD_S = 60.0
"""All records are read at least so often; else only when their folder has changed, as those of 256 ranks are many
small files on a network file system."""
START_PATIENCE = 2.0
"""Ranks import for minutes on a cold file system: hosts without a record are queried after START_PATIENCE times the
patience, counted from the first record."""
ASK_S = 20.0
"""A query by ssh that takes longer has no answer."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Verdict:
    """Why the launch ends a run that does not end by itself. `lost`: hosts that do not answer."""

    cause: str
    lost: tuple[str, ...] = ()


def ask_hosts(
    hosts: Sequence[str], launch_id: str, number: int, *, ssh_args: Sequence[str] = (), timeout_s: float = ASK_S
) -> dict[str, Answer]:
    """Send a signal to the ranks of a launch on these hosts (SIGKILL: to all its processes; 0: to none, count only)."""
    argv = [sys.executable, "-m", "jp_train.cluster.signals", launch_id, str(number)]
    return run_on_hosts(hosts, argv, timeout_s=timeout_s, ssh_args=ssh_args, cwd=str(ROOT))


class Supervision:
    """Looks at one start of a run. `placed` has the host of every rank, by rank; `ask` is `ask_hosts` with
    the launch's words for ssh."""

    def __init__(
        self,
        logs: Path | None,
        run_dir: Path | None,
        launch_id: str,
        placed: Sequence[str],
        *,
        patience_s: float,
        grace_s: float,
        ask: Callable[[Sequence[str], str, int], dict[str, Answer]] = ask_hosts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logs, self._launch_id, self._placed = logs, launch_id, list(placed)
        self._heartbeats = run_dir / HEARTBEATS if run_dir is not None else None
        self._patience_s, self._grace_s, self._ask, self._clock = patience_s, grace_s, ask, clock
        self._next_look = 0.0
        self._records: list[RankRecord] = []
        self._stamp: int | None = None
        self._changed_at = self._read_at = -1e9
        self._first_record: float | None = None
        self._first_end: float | None = None
        self._all_ended: float | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._before = self._stamps()
        self._queried_at: dict[str, float] = {}
        self._pending: Future[dict[str, Answer]] | None = None
        self._pool = ThreadPoolExecutor(1)
        self._suspicions: dict[str, int] = {}

    def close(self) -> None:
        """End without waiting for open queries."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def look(self) -> Verdict | None:
        """Call often. None: let the run go on."""
        now = self._clock()
        if now < self._next_look or self._logs is None:
            return None
        self._next_look = now + LOOK_S
        records = self._current_records(self._logs, now)
        return self._outlived(records, now) or self._answered() or self._silent(records, now)

    def _current_records(self, logs: Path, now: float) -> list[RankRecord]:
        """The ranks' records, read again where something may have changed: a record is replaced by renaming, which
        the folder's time shows."""
        try:
            stamp = os.stat(logs).st_mtime_ns
        except OSError:
            stamp = None
        if stamp is None or stamp != self._stamp:
            self._changed_at = now
        if now - self._changed_at <= SETTLED_S or now - self._read_at >= REREAD_S:
            self._records, self._stamp, self._read_at = read_records(logs), stamp, now
        return self._records

    def _outlived(self, records: Sequence[RankRecord], now: float) -> Verdict | None:
        """Ranks or launchers that go on after the run has ended."""
        ended = [record for record in records if record.code is not None]
        if not ended:
            return None
        self._first_end = self._first_end or now
        if len(ended) == len(self._placed):
            self._all_ended = self._all_ended or now
            over_due = now - self._all_ended > self._patience_s
            return Verdict("all ranks have ended, but not their launcher") if over_due else None
        failed = culprits(ended)
        if now - self._first_end <= (self._patience_s if failed else self._grace_s):
            return None
        over = {record.rank for record in ended}
        left = [rank for rank in range(len(self._placed)) if rank not in over]
        first = (failed or ended)[0]
        named = ", ".join(f"rank {rank} on {self._placed[rank]}" for rank in left[:4]) + (
            f" and {len(left) - 4} more" if len(left) > 4 else ""
        )
        return Verdict(f"{first.describe()}; {named} did not end with it within {now - self._first_end:.0f} s")

    def _answered(self) -> Verdict | None:
        """The answers of the hosts that were queried. A host is lost when two queries in a row had no answer."""
        if self._pending is None or not self._pending.done():
            return None
        pending, self._pending = self._pending, None
        answers = pending.result()
        lost: list[str] = []
        empty: list[str] = []
        for host, answer in answers.items():
            left = reached(answer.stdout) if answer.ok else None
            if left:
                self._suspicions[host] = 0
                continue
            self._suspicions[host] = self._suspicions.get(host, 0) + 1
            if self._suspicions[host] > 1:
                (empty if left == 0 else lost).append(
                    f"{host} ({'no process of the run is left there' if left == 0 else answer.summary})"
                )
            else:
                self._queried_at.pop(host, None)  # again, at once
        if not lost and not empty:
            return None
        causes = [f"cannot be reached any more: {', '.join(lost)}"] if lost else []
        causes += [f"gone: {', '.join(empty)}"] if empty else []
        return Verdict("; ".join(causes), tuple(text.partition(" ")[0] for text in lost))

    def _silent(self, records: Sequence[RankRecord], now: float) -> Verdict | None:
        """Query the hosts of ranks that give no sign of life, while others do."""
        if records:
            self._first_record = self._first_record or now
        suspects: set[str] = set()
        over = {record.rank for record in records if record.code is not None}
        if self._first_record is not None and now - self._first_record > START_PATIENCE * self._patience_s:
            known = {record.rank for record in records}
            suspects |= {host for rank, host in enumerate(self._placed) if rank not in known}
        for rank, stamp in self._stamps().items():
            if stamp != self._before.get(rank) and stamp != self._beats.get(rank, (0, 0.0))[0]:
                self._beats[rank] = stamp, now
        newest = max((at for _, at in self._beats.values()), default=0.0)
        # with no sign of any rank, the file system stands still or the watchdog is off: nothing can be concluded
        alive = now - newest < self._patience_s / 2
        if alive:
            quiet = [rank for rank, (_, at) in self._beats.items() if rank not in over and now - at > self._patience_s]
            suspects |= {self._placed[rank] for rank in quiet if rank < len(self._placed)}
        if self._pending is None:
            # they give signs of life again: a query without an answer days ago does not count any more
            for host in set(self._suspicions) - suspects:
                del self._suspicions[host]
        due = [host for host in sorted(suspects) if now - self._queried_at.get(host, -1e9) > self._patience_s]
        if due and self._pending is None:
            self._queried_at.update(dict.fromkeys(due, now))
            self._pending = self._pool.submit(self._ask, due, self._launch_id, 0)
        return None

    def _stamps(self) -> dict[int, int]:
        """When each rank's heartbeat file was last replaced, by its file system's clock; empty where it cannot be
        read."""
        stamps: dict[int, int] = {}
        if self._heartbeats is None:
            return stamps
        try:
            with os.scandir(self._heartbeats) as entries:
                for entry in entries:
                    number = entry.name.removeprefix("rank_").removesuffix(".json")
                    if number.isdecimal():
                        stamps[int(number)] = entry.stat().st_mtime_ns
        except OSError:
            pass
        return stamps


def failures_text(answers: Mapping[str, Answer]) -> str:
    """`node3: connection refused after 0.1 s`, for the hosts that did not answer."""
    return "; ".join(f"{host}: {answer.summary}" for host, answer in answers.items() if not answer.ok)

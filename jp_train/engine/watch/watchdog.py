"""One thread per rank that tells a slow run from a stalled one, names the cause, and ends it: never a silent
hang.

Every few seconds it writes where its rank stands (`heartbeat.py`). When the training thread has made no progress for
`engine.stall_timeout_s`, (1) all ranks are asked for their Python stacks and their last modules, (2) the lowest rank
whose watchdog still answers compares all heartbeats (`diagnosis.py`), (3) it writes the diagnosis to events.jsonl,
status.json and the console, and (4) every rank ends its process, by force: a thread that waits in a collective cannot
be woken. While any rank still makes progress nobody is ended: the others only wait for a slow one.

The other ranks' files are read by one rank and only then, so 256 ranks cost a shared file system 26 small writes a
second and nothing else. Every access of the run folder runs beside the thread with a time limit. When the folder hangs
or refuses writes, the watch goes on without the other ranks' heartbeats: a rank then ends the run only shortly before
the collectives would fail. Time in which this thread itself did not run (a suspended machine, a stopped process) does
not count as standing still.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from jp_train.config import RunConfig
from jp_train.data.processes import process_state
from jp_train.engine.watch import diagnosis
from jp_train.engine.watch.guard import WAITING_FOR_DATA, Pace, SequenceGuard
from jp_train.engine.watch.heartbeat import Beat, HeartbeatFolder
from jp_train.engine.watch.stop import EXIT_HOOK_S, SignalFlag
from jp_train.errors import JpTrainError

T = TypeVar("T")

LOOK_S = 0.5
"""Seconds between two looks at the training thread, at most."""
SLOWEST_BEAT_S = 10.0
ACCESS_S = 5.0
"""A file access that takes longer is given up for this time."""
READ_S = 0.05
"""The same for each heartbeat, where those of all ranks are read."""
REPORT_S = 20.0
"""The same for the report at the end: synced to a disk that may be slow, but before the other ranks take this one
for silent."""
COLLECTIVE_SHARE = 0.9
"""Share of `engine.collective_timeout_s` after which even a slow phase stands still: the cause is named before
collectives fail."""
SLOW_ALONE_S = 1800.0
"""Seconds that a slow phase may take at least where there is only one rank, which no collective's timeout ends."""
DEPUTIES = 4
"""Ranks that take over the diagnosis, in order, when those before them do not answer."""
FAILURE_WAIT_S = 5.0
"""Seconds that a rank whose collective failed waits for the others to say where they stand."""

Report = Callable[[JpTrainError, dict[str, Any]], None]


class Loader(Protocol):
    """What the watchdog asks of the step loader (`data/loader.py`)."""

    received: int

    def awaited(self) -> dict[str, Any]: ...


class Watchdog:
    """Watches one rank for the duration of a `with` block. `follow` names what to watch, as soon as there is an engine
    and a loader.

    `attempt` is the same on all ranks and new for every start. `report` is called on the rank that names the cause,
    from the watchdog's thread; `stopped` with the exit code when a signal ends the process at once (before there is
    anything to save, or a second one); `end` ends the process (os._exit but for tests).
    """

    def __init__(
        self,
        cfg: RunConfig,
        *,
        rank: int,
        world: int,
        attempt: str,
        flag: SignalFlag,
        report: Report,
        stopped: Callable[[int], None] = lambda code: None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.world = rank, world
        self.on = cfg.engine.stall_timeout_s > 0
        self.guard = SequenceGuard(None, rank)
        self.loader: Loader | None = None
        self._run_dir = Path(cfg.run_dir)
        self._files = HeartbeatFolder(self._run_dir, attempt)
        collective_s = COLLECTIVE_SHARE * cfg.engine.collective_timeout_s
        self._normal_s = min(cfg.engine.stall_timeout_s, collective_s)
        self._slow_s = collective_s if world > 1 else max(collective_s, SLOW_ALONE_S)
        self._look_s = min(LOOK_S, self._normal_s / 8) if self.on else LOOK_S
        self._beat_s = min(SLOWEST_BEAT_S, self._normal_s / 20)
        self._settle_s = 2.5 * max(self._beat_s, self._look_s)
        self._flag, self._report, self._stopped, self._end = flag, report, stopped, end
        self._host = socket.gethostname()
        self._training_thread = threading.get_ident()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._folder_works, self._complained = True, False
        self._busy: threading.Thread | None = None
        self._beats = 0
        self._seen: tuple[int, int, int] = (-1, -1, -1)
        self._since = self._written = time.monotonic()
        self._answered = ""
        self._next_check = 0.0

    def __enter__(self) -> Watchdog:
        self.guard.explain = self.explain_failure
        if self.on:
            self._access(lambda: self._files.create(self.world, clear=self.rank == 0))
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._closing.set()
        self._thread.join(ACCESS_S)
        if self.on:
            self._beat(ended=f"{type(error).__name__}: {error}"[:2000] if error is not None else "no error")

    def follow(self, guard: SequenceGuard, loader: Loader | None = None) -> None:
        """Watch this guard (and loader) from now on."""
        guard.explain = self.explain_failure
        self.guard, self.loader = guard, loader or self.loader

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(self._look_s):
            now = time.monotonic()
            slept = now - before - self._look_s
            if slept > 5.0 + self._look_s:  # stopped or suspended: the training thread did not run either
                self._since += slept
            try:
                self._look(now)
            except Exception:  # a fault in the watchdog may not end the watch, and is printed
                traceback.print_exc()
            before = time.monotonic()

    def _look(self, now: float) -> None:
        starting = self.guard.step < 0
        code = self._flag.must_exit(starting=starting)
        if code:
            self._say(
                f"rank {self.rank}: signal {code - 128}: ends at once, "
                f"{'nothing to save yet' if starting else 'asked twice'}"
            )
            self._bounded(lambda: self._stopped(code), within_s=REPORT_S if starting else EXIT_HOOK_S)
            self._leave(code)
        seen = (id(self.guard), self.guard.progress, self.loader.received if self.loader else 0)
        if seen != self._seen:
            self._seen, self._since = seen, now
        if not self.on:
            return
        if now - self._written >= self._beat_s:
            self._written = now
            self._correspond()
        limit = self.limit_s()
        if limit is not None and now - self._since > limit and now >= self._next_check:
            self._next_check = now + self._settle_s
            self._stalled()

    def limit_s(self) -> float | None:
        """Seconds that the present phase may go without progress; None: as long as it likes, as no other rank waits
        in a collective."""
        return {Pace.NORMAL: self._normal_s, Pace.SLOW: max(self._normal_s, self._slow_s), Pace.FREE: None}[
            self.guard.pace
        ]

    def _correspond(self) -> None:
        """Say where this rank stands, and do what other ranks ask for: stacks and last modules, or to end."""
        self._beat()
        request, end = self._access(lambda: (self._files.requested(), self._files.announced_end())) or ("", None)
        if request and request != self._answered:
            self._answer(request)
        if end is not None:
            self._say(
                f"rank {self.rank} ends because of the verdict of rank {end['rank']}"
                + (f": {end['text']}" if self.rank == 0 else "")
            )
            self._leave(int(end["exit_code"]))

    # -- a stall ----------------------------------------------------------------------------

    def _stalled(self) -> None:
        """The training thread stands still. Leave it to a lower rank that answers, else find the cause, and end the
        run if nobody moves."""
        lower = range(min(self.rank, DEPUTIES))
        first = {rank: beat for rank in lower if (beat := self._access(partial(self._files.read_beat, rank)))}
        if first:
            self._wait(self._settle_s)
            for rank, beat in first.items():
                again = self._access(partial(self._files.read_beat, rank))
                if again and again.beat > beat.beat and not again.ended:
                    return
        before = self._read_all()
        name = f"{self.rank}-{self._beats}"
        self._access(lambda: self._files.ask(name, self.rank, f"rank {self.rank} stands still"))
        self._answer(name)
        self._wait(self._settle_s)
        after = self._read_all()
        if self._closing.is_set() or self.guard.progress != self._seen[1]:
            return
        idle = time.monotonic() - self._since
        if self.world > 1 and idle < self._slow_s and not (self.rank in before and self.rank in after):
            self._say(
                f"rank {self.rank} has waited {idle:.0f} s at {self._describe().place}; {self._files.folder} does not "
                "say why"
            )
            self._next_check = time.monotonic() + max(self._normal_s / 4, self._settle_s)
            return
        at_work = [rank for rank in diagnosis.moving(before, after) if rank != self.rank]
        if at_work:
            self._say(
                f"rank {self.rank} has waited {idle:.0f} s at {self._describe().place}; rank {at_work[0]} still "
                f"works, at {after[at_work[0]].place}"
            )
            self._next_check = time.monotonic() + max(self._normal_s / 4, self._settle_s)
            return
        self._conclude(self._cause(before, after))

    def _cause(self, before: dict[int, Beat], after: dict[int, Beat]) -> diagnosis.Diagnosis:
        # the folder does not work: this rank knows only itself
        if self.rank not in before or self.rank not in after:
            local = self._describe(full=True)
            before, after = {}, {self.rank: local}
            result = diagnosis.diagnose(
                {self.rank: local}, {self.rank: Beat(**{**vars(local), "beat": local.beat + 1})}, 1, self._host
            )
            if self.world == 1:
                return result
            text = (
                f"{result.text}. The heartbeats of the other ranks cannot be read in {self._files.folder}: look at "
                "each rank's own message"
            )
            return diagnosis.Diagnosis(result.kind, text, result.ranks, result.error)
        return diagnosis.diagnose(before, after, self.world, self._host)

    def _conclude(self, result: diagnosis.Diagnosis) -> None:
        stacks = f"; stacks: {self._files.stacks}" if self._folder_works else ""
        text = f"no progress for {time.monotonic() - self._since:.0f} s: {result.text}{stacks}"
        error = result.error(text)
        details = {
            "step": self.guard.step,
            "kind": result.kind,
            "ranks": list(result.ranks),
            "found_by": self.rank,
            "place": self._describe().place,
        }
        self._bounded(lambda: self._report(error, details), within_s=REPORT_S)
        self._say(f"rank {self.rank}: {type(error).__name__}: {text}")
        self._access(
            lambda: self._files.announce_end(
                {"text": f"{type(error).__name__}: {text}", "exit_code": error.exit_code, "rank": self.rank}
            )
        )
        if self.world > 1:  # the others end first, or they would report this rank as the one that left
            time.sleep(self._settle_s)
        self._leave(error.exit_code)

    def explain_failure(self) -> str:
        """Called by the training thread when a collective has failed: what the heartbeats of the other ranks say;
        empty when that is nothing."""
        if self.world == 1 or not self.on or self._closing.is_set():
            return ""
        if self.rank >= DEPUTIES:
            self._answer("failed")
            return ""
        before = self._read_all()
        name = f"{self.rank}-{self._beats}-failed"
        self._access(lambda: self._files.ask(name, self.rank, f"a collective failed on rank {self.rank}"))
        self._answer(name)
        deadline = time.monotonic() + max(FAILURE_WAIT_S, 2 * self._settle_s)
        while True:
            after = self._read_all()
            if (
                all(self._has_spoken(before.get(rank), after.get(rank)) for rank in range(self.world))
                or time.monotonic() > deadline
            ):
                break
            time.sleep(self._look_s)
        if self.rank not in after:
            return ""
        result = diagnosis.diagnose(before, after, self.world, self._host)
        return result.text if result.kind in ("missing", "sequence", "behind") else ""

    def _has_spoken(self, before: Beat | None, now: Beat | None) -> bool:
        """Whether a rank has said where it stands since `before`, or never will."""
        if now is None:
            return False
        answered = bool(now.answers) and (before is None or now.beat > before.beat)
        return answered or bool(now.ended) or (now.host == self._host and process_state(now.pid) == "gone")

    # -- small parts -------------------------------------------------------------------------------

    def _describe(self, *, answers: str = "", ended: str = "", full: bool = False) -> Beat:
        guard = self.guard
        more: dict[str, Any] = {}
        if full or answers:
            more = {"trail": _copied(guard.trail), "frame": innermost(self._training_thread)}
            if guard.phase == WAITING_FOR_DATA and self.loader is not None:
                more["awaited"] = self._bounded(self.loader.awaited) or {}
        return Beat(
            attempt=self._files.attempt, rank=self.rank, pid=os.getpid(), host=self._host, beat=self._beats,
            time=round(time.time(), 3), monotonic=round(time.monotonic(), 3), step=guard.step, phase=guard.phase,
            micro_batch=guard.micro_batch, module=guard.last, entered=guard.entered, signature=guard.signature,
            progress=guard.progress + (self.loader.received if self.loader else 0),
            idle_s=round(time.monotonic() - self._since, 3), limit_s=self.limit_s(), answers=answers, ended=ended,
            **more,
        )  # fmt: skip

    def _beat(self, *, ended: str = "") -> None:
        with self._lock:  # the training thread beats too, when a collective has failed
            self._beats += 1
            beat = self._describe(answers=self._answered, ended=ended)
            self._access(lambda: self._files.write_beat(beat))

    def _answer(self, name: str) -> None:
        """Answer a request: stacks into a file (to the console when there is none), and a heartbeat with the last
        modules."""
        self._answered = name
        path = self._files.stack_file(self.rank, self.guard.step)
        if self._access(lambda: self._dump(path)) is None:
            self._dump_to(sys.stderr)
        self._beat()

    def _dump(self, path: Path) -> bool:
        with path.open("w", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank}, process {os.getpid()} on {self._host}, {time.strftime('%Y-%m-%d %H:%M:%S')}, "
                f"{self._describe().place}\n\n"
            )
            file.flush()
            self._dump_to(file)
        return True

    def _dump_to(self, file: TextIO) -> None:
        with suppress(OSError, ValueError, AttributeError):  # there may be no file descriptor behind it
            faulthandler.dump_traceback(file, all_threads=True)

    def _read_all(self) -> dict[int, Beat]:
        def read() -> dict[int, Beat]:
            return {rank: beat for rank in range(self.world) if (beat := self._files.read_beat(rank))}

        return self._access(read, within_s=max(ACCESS_S, READ_S * self.world)) or {}

    def _access(self, action: Callable[[], T], within_s: float = ACCESS_S) -> T | None:
        """Use the run folder; None when that fails or hangs, which is printed once."""
        try:
            result = self._bounded(action, strict=True, within_s=within_s)
        except OSError as error:
            self._folder_works = False
            if not self._complained:
                self._complained = True
                self._say(
                    f"rank {self.rank}: the watchdog cannot use {self._run_dir}: {error}. As long as that lasts, a "
                    "stall is named on the console only"
                )
            return None
        self._folder_works = True
        return result

    def _bounded(self, action: Callable[[], T], *, strict: bool = False, within_s: float = ACCESS_S) -> T | None:
        """Run `action` in another thread for at most `within_s`; None when it hangs or fails. `strict`: an
        OSError is raised instead."""
        if self._busy is not None and self._busy.is_alive():
            if strict:
                raise TimeoutError("an earlier access still hangs")
            return None
        box: list[Any] = []

        def attempt() -> None:
            try:
                box.append((True, action()))
            except Exception as error:
                box.append((False, error))

        helper = threading.Thread(target=attempt, name="watchdog-files", daemon=True)
        helper.start()
        helper.join(within_s)
        if not box:
            self._busy = helper
            if strict:
                raise TimeoutError(f"an access has hung for more than {within_s:g} s")
            return None
        worked, value = box[0]
        if not worked and strict and isinstance(value, OSError):
            raise value
        return value if worked else None

    def _wait(self, seconds: float) -> None:
        """Let the other ranks answer, and go on answering them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._closing.is_set():
            time.sleep(self._beat_s)
            self._correspond()

    def _leave(self, code: int) -> None:
        for worker in (self._bounded(self.loader.awaited) or {}).get("workers", ()) if self.loader else ():
            with suppress(OSError):
                os.kill(worker["pid"], signal.SIGKILL)  # a stopped one would never notice that its trainer is gone
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        self._closing.set()
        self._end(code)

    def _say(self, text: str) -> None:
        print(f"watchdog: {text}", file=sys.stderr, flush=True)


def innermost(thread: int) -> str:
    """`train.py:210 in train_step`: the innermost frame of this package that a thread is in; empty when it is in
    none."""
    frame = sys._current_frames().get(thread)
    package = f"{os.sep}jp_train{os.sep}"
    while frame is not None:
        code = frame.f_code
        if package in code.co_filename:
            return f"{code.co_filename.rpartition(package)[2]}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return ""


def _copied(trail: Any) -> tuple[str, ...]:
    """The trail as it is: another thread may append meanwhile."""
    for _ in range(5):
        try:
            return tuple(trail)
        except RuntimeError:
            continue
    return ()

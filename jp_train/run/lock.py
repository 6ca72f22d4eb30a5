"""One job at a time in one run folder: a lease that a live job renews, and that the next job takes over when its holder
is dead.

    RUN_DIR/run.lock    who trains here (host, process, launch, since when) and a counter that grows every BEAT_S
                        seconds

Two jobs in one folder would mix their metrics and delete each other's checkpoints. The lock is made by a hard link
(exclusive on local and on network file systems) and renewed in place through an open descriptor, so that a job which
lost it can never write into another one's. Whether a holder lives is known at once on its own host: the process is
there or it is not, and a host that has restarted runs none of its old processes. From any other host it is watched: a
counter that stands still for LEASE_S seconds belongs to a dead job. No clocks of two hosts are compared, and no lock of
the file system is relied on; where there is one, it serialises those who take over.

`jp-train launch`, which sees its ranks end, may hand a dead launch's lock back by `release_dead_launch`, so that its
restart need not watch. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jp_train.errors import ConfigError, LaunchError

LAUNCH_ID = "JP_TRAIN_LAUNCH_ID"
"""Environment variable that marks every process of one launch."""
LOCK_FILE = "run.lock"
BEAT_S = 5.0
"""Seconds between two renewals."""
LEASE_S = 40.0
"""A holder on another host that has not renewed for so long is dead: eight renewals, which a busy file system may
delay."""
GUARD_S = 5.0
"""Those who take over wait for each other for so long; then they go on without, as on a file system that has no
locks."""
SIZE = 1024
"""Bytes of a lock file: every renewal replaces them all."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run folder. `token` is new for every job; `since` is in seconds since 1970, for people."""

    token: str
    host: str
    machine: str
    boot: str
    pid_space: str
    pid: int
    process_started: str
    launch_id: str
    since: float
    beat: int = 0

    def describe(self) -> str:
        """`process 12 on node3 (launch 5ac1, since 2026-11-22 10:00:00)`."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return (
            f"process {self.pid} on {self.host} ({f'launch {self.launch_id}, ' if self.launch_id else ''}since {since})"
        )


class RunLock:
    """Holds the lock of a run folder until `release`, renewing it in a thread. `take` makes one."""

    def __init__(self, path: Path, holder: Holder, descriptor: int, lost: Callable[[str], None]) -> None:
        self.path, self.holder = path, holder
        self._descriptor, self._lost = descriptor, lost
        self._beat = holder.beat
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; does nothing where it was lost. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(OSError), _guarded(self.path.parent):
            if self._is_mine():
                self.path.unlink()
        self._thread.join(1.0)
        # a renewal that hangs would else write into whatever file gets this number next
        if not self._thread.is_alive():
            os.close(self._descriptor)

    def release_nowait(self, within_s: float = 2.0) -> None:
        """`release` for a process that is about to end whatever happens: waits no longer for a file system that
        hangs."""
        helper = threading.Thread(target=self.release, name="run-lock-release", daemon=True)
        helper.start()
        helper.join(within_s)

    def _renew(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self._beat += 1
                os.pwrite(self._descriptor, _text(self.holder, self._beat), 0)
                os.fsync(self._descriptor)
                if not self._is_mine() and not self._closing.is_set():
                    self._again()
            except OSError:
                continue  # a full or hanging disk: the next renewal tries again

    def _is_mine(self) -> bool:
        mine = os.fstat(self._descriptor)
        try:
            present = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (present.st_ino, present.st_dev) == (mine.st_ino, mine.st_dev)

    def _again(self) -> None:
        """The file is not this job's: make it anew where it was only deleted, and give up where another job has it."""
        made = _create(self.path, self.holder)
        if made is not None:
            os.close(self._descriptor)
            self._descriptor = made
            return
        other = read_holder(self.path.parent)
        if other is None or other.token != self.holder.token:
            self._closing.set()
            by = other.describe() if other else "another job"
            self._lost(
                f"{self.path.parent} was taken over by {by} while this job stood still for more than "
                f"{LEASE_S:.0f} s: this one ends, or both would write there. Its checkpoints are the other job's now"
            )


def take(
    run_dir: str | os.PathLike[str],
    *,
    lost: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> RunLock:
    """Lock a run folder for this process. A dead holder's lock is taken over: at once on the holder's host, else after
    LEASE_S seconds without a sign.

    `lost` is called, from a thread, when another job takes the lock from this one after all (it was suspended for
    longer than the lease); the default ends the process. Raises LaunchError when a live job trains there, OSError when
    the folder cannot be written.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / LOCK_FILE, identity()
    watched: bytes | None = None
    while True:
        descriptor = _create(path, me)
        if descriptor is not None:
            return RunLock(path, me, descriptor, lost or _end)
        content = _read(path)
        if content is None:
            continue  # released meanwhile
        holder = _parsed(content)
        standing = "unknown" if holder is None else standing_of(holder, me)
        if holder is not None and standing == "alive":
            raise LaunchError(refusal(folder, holder))
        if standing == "unknown" and content != watched:
            if not _stands_still(path, content, holder, say or _say):
                continue
            watched = content
        _remove(path, content, me.token)


def read_holder(run_dir: str | os.PathLike[str]) -> Holder | None:
    """Who holds (or held, and died) the lock of a run folder; None when nobody does. Raises OSError other than for a
    missing file."""
    content = _read(Path(run_dir) / LOCK_FILE)
    return None if content is None else _parsed(content)


def standing_of(holder: Holder, me: Holder | None = None) -> str:
    """`alive` or `dead` where this host can know, else `unknown`: then only the counter shows it."""
    me = me or identity()
    if holder.boot == me.boot and holder.pid_space == me.pid_space and (holder.boot or holder.machine == me.machine):
        return "alive" if _process_lives(holder.pid, holder.process_started) else "dead"
    if holder.machine == me.machine and holder.boot != me.boot:
        return "dead"  # the host has restarted since
    return "unknown"


def release_dead_launch(run_dir: str | os.PathLike[str], launch_id: str) -> bool:
    """Remove the lock of a launch all of whose processes are known to have ended, on whatever host they ran. True when
    there was one.

    For the launcher, between two attempts. A lock of any other launch stays.
    """
    path = Path(run_dir) / LOCK_FILE
    holder = read_holder(run_dir)
    if holder is None or not launch_id or holder.launch_id != launch_id:
        return False
    return _remove(path, holder.token, uuid.uuid4().hex)


def identity() -> Holder:
    """This process as a holder."""
    host = socket.gethostname()
    return Holder(
        token=uuid.uuid4().hex,
        host=host,
        machine=f"{host}/{_line('/etc/machine-id')}",
        boot=_line("/proc/sys/kernel/random/boot_id"),
        pid_space=_pid_space(),
        pid=os.getpid(),
        process_started=_process_started(os.getpid()),
        launch_id=os.environ.get(LAUNCH_ID, "")[:64],
        since=time.time(),
    )


# -- the file --------------------------------------------------------------------------------------


def _create(path: Path, holder: Holder) -> int | None:
    """Make the lock file; its descriptor, None when there is one already."""
    temporary = path.with_name(f".{LOCK_FILE}.{holder.token}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    made = False
    try:
        os.pwrite(descriptor, _text(holder, holder.beat), 0)
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
            made = True
        except FileExistsError:
            made = os.fstat(descriptor).st_nlink == 2  # NFS may repeat a request whose answer was lost
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            made, descriptor = _create_without_links(path, holder, descriptor)
    finally:
        temporary.unlink(missing_ok=True)
        if not made:
            os.close(descriptor)
    return descriptor if made else None


def _create_without_links(path: Path, holder: Holder, descriptor: int) -> tuple[bool, int]:
    """On a file system without hard links: exclusive creation, whose content comes a moment later (a reader takes a
    torn one for unknown)."""
    try:
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False, descriptor
    os.close(descriptor)
    os.pwrite(made, _text(holder, holder.beat), 0)
    os.fsync(made)
    return True, made


def _remove(path: Path, expected: str | bytes, token: str) -> bool:
    """Take away the lock that `expected` names: a token, or the very bytes (then a renewal saves it). False when it
    is another one by now."""
    away = path.with_name(f".{LOCK_FILE}.{token}.away")
    with _guarded(path.parent):
        content = _read(path)
        if content is None or not _same(content, expected):
            return False
        try:
            os.rename(path, away)
        except FileNotFoundError:
            return False
        moved = _read(away)
        # without locks somebody was faster by a hair: give it back
        if moved is not None and not _same(moved, expected):
            with contextlib.suppress(FileExistsError):
                os.link(away, path)
            away.unlink(missing_ok=True)
            return False
        away.unlink(missing_ok=True)
        return True


def _same(content: bytes, expected: str | bytes) -> bool:
    if isinstance(expected, bytes):
        return content == expected
    holder = _parsed(content)
    return holder is not None and holder.token == expected


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _text(holder: Holder, beat: int) -> bytes:
    return json.dumps({**asdict(holder), "beat": beat}).encode("ascii")[: SIZE - 1].ljust(SIZE - 1) + b"\n"


def _parsed(content: bytes) -> Holder | None:
    """The holder, None for content that is no lock (a crash of a host, or a renewal seen half way)."""
    try:
        values = json.loads(content)
        return Holder(
            **{
                item.name: {"int": int, "float": float}.get(str(item.type), str)(values[item.name])
                for item in fields(Holder)
            }
        )
    except (ValueError, TypeError, KeyError):
        return None


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """One at a time among those who remove locks, where the file system can do that."""
    descriptor = os.open(folder / f".{LOCK_FILE}.guard", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + GUARD_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > until:
                    break
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


# -- is it alive -----------------------------------------------------------------------------------


def _stands_still(path: Path, content: bytes, holder: Holder | None, say: Callable[[str], None]) -> bool:
    """Watch the lock for the lease. False as soon as it changes: renewed (then refused), or released."""
    who = holder.describe() if holder else f"a job whose lock {path} cannot be read"
    say(
        f"{path.parent} is locked by {who}, of which this host knows nothing more: taken over if it gives no sign of "
        f"life within {LEASE_S:.0f} s"
    )
    until = time.monotonic() + LEASE_S
    reported = time.monotonic()
    while time.monotonic() < until:
        time.sleep(0.2)
        now = _read(path)
        if now != content:
            later = None if now is None else _parsed(now)
            if later is not None and holder is not None and later.token == holder.token:
                raise LaunchError(refusal(path.parent, later))
            return False
        if time.monotonic() - reported > 10.0:
            reported = time.monotonic()
            say(f"no sign of life of {who} yet; taken over in {until - reported:.0f} s")
    say(f"{who} gave no sign of life for {LEASE_S:.0f} s: its run folder is taken over")
    return True


def require_free(run_dir: str | os.PathLike[str]) -> None:
    """Raise LaunchError when a job that this host knows to be alive trains in the folder. (`take` also sees one on
    another host.)"""
    try:
        holder = read_holder(run_dir)
    except OSError:
        return
    if holder is not None and standing_of(holder) == "alive":
        raise LaunchError(refusal(Path(run_dir), holder))


def unwritable(run_dir: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The error for a run folder that takes no file."""
    return ConfigError(
        f"run_dir {run_dir} cannot be written: {error}; make room or make it writable, or choose another run_dir"
    )


def refusal(folder: Path, holder: Holder) -> str:
    """Why no other job may start in the folder of a live one, and what to do."""
    return (
        f"run_dir {folder} is in use: {holder.describe()} trains there. Two jobs would mix their metrics and delete "
        f"each other's checkpoints. Wait for its end, or stop it (`kill -TERM {holder.pid}` on {holder.host}: it saves "
        "first), or give this job another run_dir"
    )


def _process_lives(pid: int, started: str) -> bool:
    """Whether a process of this host runs, and is the one that started then (numbers are used again). A stopped one
    lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    columns = _stat(pid)
    if columns is None:
        return True  # another user's, hidden
    return columns[0] not in "ZX" and (not started or columns[19] == started)


def _process_started(pid: int) -> str:
    """Clock ticks from the host's start to the process's."""
    columns = _stat(pid)
    return columns[19] if columns else ""


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name: state first, start time at 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()[:64]
    except OSError:
        return ""


def _end(text: str) -> None:
    _say(text)
    os._exit(LaunchError.exit_code)


def _say(text: str) -> None:
    print(f"run lock: {text}", file=sys.stderr, flush=True)

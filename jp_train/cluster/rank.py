"""One rank of a launch: `python -m jp_train.cluster.rank TARGET...` starts `jp_train TARGET...`, logs what it prints
and records how it ended.

Whatever started this process (DeepSpeed's launcher, mpirun, srun), the rank gets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. Its output goes to RUN_DIR/logs/LAUNCH/HOST_rankN.log; the terminal gets that of rank 0,
and never makes a rank wait. How it ended goes to a record beside the log (`records.py`), from which the launch names
the host, the rank and the cause. When the process that started this one dies, the rank gets SIGTERM, to save and
exit, as nothing else would stop it. Standard library only: it starts in a moment, on every host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from jp_train.cluster.command import LOGS, WORLD
from jp_train.cluster.credentials import received
from jp_train.cluster.options import ranks_of
from jp_train.cluster.records import LOG_BYTES, STOPPED, TAIL_LINES, RankRecord, log_path, ranks_over
from jp_train.errors import LaunchError
from jp_train.files import has_gpu_files
from jp_train.run.lock import LAUNCH_ID
from jp_train.terminal import folded, terminal_columns

NUMBERINGS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
"""Names under which DeepSpeed's launcher, Open MPI and Slurm number their processes, in this order of preference."""
PR_SET_PDEATHSIG = 1
LOOK_S = 0.5
DRAIN_S = 5.0
"""Seconds after the rank's end that its children may still hold its output open, and that a slow terminal is waited
for."""
OTHERS_S = 120.0
"""Seconds that a rank which has obeyed a stop signal waits for the others; they save together, so it takes a moment."""
WAITING_LINES = 10_000
"""Lines that a slow terminal may be behind; more are left out there (the log has them)."""
TRACKER_NOISE = re.compile(rb"resource_tracker|^ *warnings\.warn\(")
"""What Python's resource tracker says after every process that was killed; no last words of a rank."""


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the rank: RANK, LOCAL_RANK and WORLD_SIZE whatever the launcher calls them, and the devices of
    its host.

    Raises LaunchError when this is no process of a launch, or the scheduler placed it on another host than the hostfile
    does.
    """
    env = dict(environ)
    names = next((names for names in NUMBERINGS if all(name in env for name in names)), None)
    if names is None:
        raise LaunchError(
            f"this is no process of a launch: none of {', '.join(names[0] for names in NUMBERINGS)} is set; "
            "use `jp-train launch`"
        )
    for ours, theirs in zip(NUMBERINGS[0], names, strict=True):
        env[ours] = env[theirs]
    if names is NUMBERINGS[0]:
        return env
    rank, world = int(env["RANK"]), ranks_of(env[WORLD])
    if int(env["WORLD_SIZE"]) != len(world):
        raise LaunchError(
            f"{names[2]} is {env['WORLD_SIZE']}, but the hostfile has {len(world)} slots; let `jp-train launch` choose "
            "the numbers"
        )
    host = world[rank][0]
    placed = env.get("SLURMD_NODENAME", host)
    if placed != host:
        raise LaunchError(
            f"rank {rank} runs on {placed}, the hostfile has it on {host}: Slurm numbers hosts in its own order; write "
            'the hostfile in that order (`scontrol show hostnames "$SLURM_JOB_NODELIST"`)'
        )
    env["MASTER_ADDR"], env["MASTER_PORT"] = env["JP_TRAIN_MASTER_ADDR"], env["JP_TRAIN_MASTER_PORT"]
    # all local ranks see all devices that the run uses on the host, as under DeepSpeed's launcher; Slurm may have
    # chosen them already
    env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(str(slot) for name, slot in world if name == host))
    return env


def gpu_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What torch and NCCL are told on a host with GPUs, before they are loaded, where the user has not: memory in
    segments that grow (pictures a row vary, so sizes do), and NCCL's flight recorder, with a file a rank in
    RUN_DIR/stacks when a collective times out."""
    settings = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if environ.get(LOGS):
        settings["TORCH_FR_DUMP_TEMP_FILE"] = str(Path(environ[LOGS]).parents[1] / "stacks" / "nccl_rank_")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {name: value for name, value in settings.items() if name not in environ}


class Log:
    """A rank's log: the newest lines, at most 2 x LOG_BYTES. A disk that cannot be written costs lines, never the
    rank."""

    def __init__(self, path: Path, *, limit: int = LOG_BYTES) -> None:
        self._path, self._limit = path, limit
        self._file: IO[bytes] | None = None
        self._size = 0
        self._retry_at = 0.0
        self.lost = 0

    def write(self, line: bytes) -> None:
        """Append a line; after an OSError it is counted in `lost`, and the file is tried again 30 s later."""
        try:
            if self._file is None:
                if time.monotonic() < self._retry_at:
                    self.lost += 1
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
                self._size = self._file.tell()
            if self._size + len(line) > self._limit:
                self._file.close()
                self._file = None
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
                self._file = self._path.open("ab", buffering=0)
                self._size = 0
            self._file.write(line)
            self._size += len(line)
        except OSError as error:
            if not self.lost:
                print(f"{self._path} cannot be written: {error}", file=sys.stderr, flush=True)
            self.lost += 1
            self._file, self._retry_at = None, time.monotonic() + 30.0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Terminal:
    """Copies lines to stdout and stderr from a thread, so that a terminal or network that stands still stops no
    rank."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[int, bytes] | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, descriptor: int, line: bytes) -> None:
        """Queue a line for stdout (1) or stderr (2); dropped when the queue is full."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((descriptor, line))

    def close(self) -> None:
        """Write what is queued, for at most 2 x DRAIN_S seconds."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=DRAIN_S)
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            descriptor, line = item
            rest = _fitted(line, descriptor)
            try:
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:  # the launch is gone; the log goes on
                continue


def _fitted(line: bytes, descriptor: int) -> bytes:
    """A line about a training step, folded to the width of the terminal."""
    text = line.removesuffix(b"\n")
    columns = terminal_columns(descriptor)
    if columns is None or len(text) <= columns:
        return line
    return folded(text.decode(errors="surrogateescape"), columns).encode(errors="surrogateescape") + b"\n"


class Supervisor:
    """Runs one rank to its end."""

    def __init__(self, target: Sequence[str], env: MutableMapping[str, str]) -> None:
        self._env = env
        self._command = [sys.executable, "-u", "-m", "jp_train", *target]
        self._rank = int(env["RANK"])
        world = ranks_of(env[WORLD]) if env.get(WORLD) else []
        self._host, self._slot = (
            world[self._rank] if self._rank < len(world) else (socket.gethostname(), int(env["LOCAL_RANK"]))
        )
        self._logs = Path(env[LOGS]) if env.get(LOGS) else None
        self._log = Log(log_path(self._logs, self._host, self._rank)) if self._logs else None
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._reason = ""
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start the rank, wait for it, and return its code as Popen does: negative for a signal."""
        parent, me = os.getppid(), os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, self._forward)
        # without a log every rank writes to the terminal itself
        pipe = subprocess.PIPE if self._log else None
        self._child = child = subprocess.Popen(
            self._command, env=self._env, stdout=pipe, stderr=pipe, preexec_fn=lambda: _end_with_parent(me)
        )
        record = RankRecord(self._rank, self._host, self._slot, child.pid, time.time())
        self._store(record)
        terminal = Terminal() if self._rank == 0 and self._log else None
        self._follow(child, parent, terminal)
        code = child.wait()
        tail = [line.decode(errors="replace").rstrip() for line in self._tail] if code else []
        self._store(record.over(code, reason=self._reason, tail=tail))
        if terminal is not None:
            terminal.close()
        if self._log:
            self._log.close()
        if code in STOPPED:
            self._wait_for_others()
        return code

    def _wait_for_others(self) -> None:
        """Stay until the other ranks have saved too: every launcher kills them as soon as it sees one end with a
        code other than 0."""
        until = time.monotonic() + OTHERS_S
        world = int(self._env["WORLD_SIZE"])
        while self._logs is not None and 0 < ranks_over(self._logs) < world and time.monotonic() < until:
            time.sleep(LOOK_S)

    def _follow(self, child: subprocess.Popen[bytes], parent: int, terminal: Terminal | None) -> None:
        """Copy the rank's output until it has ended and nothing more comes."""
        selector = selectors.DefaultSelector()
        parts: dict[int, bytes] = {}
        for stream, descriptor in ((child.stdout, 1), (child.stderr, 2)):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, descriptor)
                parts[descriptor] = b""
        over_at: float | None = None
        while True:
            for key, _ in selector.select(LOOK_S) if selector.get_map() else ():
                data = os.read(key.fd, 1 << 16)
                *lines, parts[key.data] = (parts[key.data] + data).splitlines(keepends=True) or [b""]
                if not data or parts[key.data].endswith((b"\n", b"\r")) or len(parts[key.data]) > 1 << 16:
                    lines.append(parts[key.data])
                    parts[key.data] = b""
                for line in filter(None, lines):
                    self._keep(line if data or line.endswith(b"\n") else line + b"\n", key.data, terminal)
                if not data:
                    selector.unregister(key.fileobj)
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
            if child.poll() is not None:
                over_at = over_at or time.monotonic() + DRAIN_S
                if not selector.get_map() or time.monotonic() > over_at:
                    break
            elif os.getppid() != parent and not self._reason:
                self._reason = "the launcher of its host died, and the rank was asked to save and exit"
                child.send_signal(signal.SIGTERM)
        for descriptor, rest in parts.items():
            if rest:
                self._keep(rest + b"\n", descriptor, terminal)

    def _keep(self, line: bytes, descriptor: int, terminal: Terminal | None) -> None:
        assert self._log is not None
        self._log.write(line)
        if descriptor == 2 and not TRACKER_NOISE.search(line):
            self._tail.append(line)
        if terminal is not None:
            terminal.write(descriptor, line)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """A scheduler may signal only the processes that it started. (Where it signals all, the rank takes a second
        one at once for the first.)"""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _store(self, record: RankRecord) -> None:
        if self._logs is not None:
            try:
                record.write(self._logs)
            except OSError as error:
                print(f"rank {self._rank}: no record in {self._logs}: {error}", file=sys.stderr, flush=True)


def _end_with_parent(parent: int) -> None:
    """In the rank, before it is jp_train: SIGTERM (save and exit) when its supervisor is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Run the rank and end as it ended: with its code, or by its signal."""
    try:
        env: dict[str, Any] = rank_environment(os.environ) | received(os.environ.get(LAUNCH_ID, ""))
    except LaunchError as error:
        print(f"jp_train.cluster.rank: LaunchError: {error}", file=sys.stderr)
        return error.exit_code
    if has_gpu_files():
        env |= gpu_settings(env)
    code = Supervisor(arguments, env).run()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Questions to one program on each of many hosts and its answers, as lines of JSON over the pipes of one ssh per host.

Starting Python and importing torch costs seconds, so each host gets one process that answers everything. Lines without
MARK come from shell start-up files and are left out. A host that stops answering is lost for the rest of the
conversation, with the cause.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jp_train.cluster.remote import Answer, Cause, classify, command_for, end, spawn

MARK = "@jp_train "
"""In front of every line that belongs to the conversation."""
MAX_LINE = 16 << 20
"""Characters of one line that are read; a longer line is no answer of a probe."""
KEPT_STDERR = 20_000
LEAVE_S = 3.0


class Conversation:
    """`argv` running on every host, and its answers. A context: at its end every program has ended, or is killed."""

    def __init__(
        self,
        hosts: Sequence[str],
        argv: Sequence[str],
        *,
        limit_s: float,
        local: Collection[str] = (),
        ssh_args: Sequence[str] = (),
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.lost: dict[str, Answer] = {}
        """Hosts that do not answer (any more), and why."""
        self._local = set(local)
        self._began = time.monotonic()
        self._lines: queue.Queue[tuple[str, float, str | None]] = queue.Queue()
        self._stderr: dict[str, list[str]] = {host: [] for host in hosts}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        self._number = 0
        try:
            for host in hosts:
                command = command_for(
                    host, argv, local=host in self._local, ssh_args=ssh_args, cwd=cwd, env=env, limit_s=limit_s
                )
                self._start(host, command)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def hosts(self) -> list[str]:
        """Those that still answer, in their order."""
        return [host for host in self._processes if host not in self.lost]

    def ask(
        self, questions: Mapping[str, Mapping[str, Any]], *, timeout_s: float, what: str
    ) -> dict[str, dict[str, Any]]:
        """Ask each host its own question, all at once; answers of those that gave one within `timeout_s` seconds. The
        others are in `lost`.

        `what` describes the question in the error of a host that falls silent. An answer is an object with `answer`, or
        with `error`, the reason why the host could not give one; `came` is when it arrived here, by time.monotonic.
        """
        self._number += 1
        waiting = set()
        for host, question in questions.items():
            if host in self.lost:
                continue
            waiting.add(host)
            pipe = self._processes[host].stdin
            assert pipe is not None
            with contextlib.suppress(OSError, ValueError):  # a closed pipe: its end of file comes through the queue
                pipe.write(json.dumps({"id": self._number, **question}) + "\n")
                pipe.flush()
        answers: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                host, came, line = self._lines.get(timeout=left)
                if line is None:
                    waiting.discard(host)
                    self._note_end(host)
                elif (reply := _parsed(line)) is not None and reply.get("id") == self._number and host in waiting:
                    waiting.discard(host)
                    answers[host] = {**reply, "came": came}
        for host in waiting:
            self.lost[host] = self._answer(
                host, None, Cause.TIMEOUT, f"no answer within {timeout_s:g} s when asked for {what}"
            )
            self._end(host)
        return answers

    def close(self) -> None:
        """Close every pipe, on which the programs end, and kill those that do not."""
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError, ValueError):
                    process.stdin.close()
        deadline = time.monotonic() + LEAVE_S
        for host, process in self._processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            self._end(host)
        for reader in self._readers:
            reader.join(1.0)

    def _start(self, host: str, command: Sequence[str]) -> None:
        try:
            process = spawn(command)
        except FileNotFoundError as error:
            self.lost[host] = Answer(host, None, "", str(error), 0.0, Cause.NO_SSH)
            return
        self._processes[host] = process
        for target in (self._read_lines, self._read_stderr):
            reader = threading.Thread(target=target, args=(host, process), daemon=True)
            reader.start()
            self._readers.append(reader)

    def _read_lines(self, host: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while line := process.stdout.readline(MAX_LINE):
                if line.startswith(MARK):
                    self._lines.put((host, time.monotonic(), line[len(MARK) :]))
            process.stdout.close()
        self._lines.put((host, time.monotonic(), None))

    def _read_stderr(self, host: str, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        kept = self._stderr[host]
        with contextlib.suppress(OSError, ValueError):
            while text := process.stderr.readline(KEPT_STDERR):
                kept.append(text)
                del kept[:-40]
            process.stderr.close()

    def _note_end(self, host: str) -> None:
        """The program's output has ended: wait for its exit code, which shows why."""
        if host in self.lost:
            return
        process = self._processes[host]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_S)
        time.sleep(0.05)  # the reader of stderr gets its last line
        code = process.poll()
        stderr = "".join(self._stderr[host])
        cause = Cause.TIMEOUT if code is None else None if host in self._local else classify(code, stderr)
        self.lost[host] = self._answer(host, code, cause, stderr)
        self._end(host)

    def _answer(self, host: str, code: int | None, cause: Cause | None, stderr: str) -> Answer:
        return Answer(host, code, "", stderr, time.monotonic() - self._began, cause)

    def _end(self, host: str) -> None:
        process = self._processes[host]
        if process.poll() is None:
            end(process)
        if process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.close()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None

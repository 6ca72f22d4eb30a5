"""One start of a run: the launcher's process, the stop signals, and the end of everything that belongs to it.

A stop signal reaches every rank at once and only once (DeepSpeed's launcher would signal one after the other, and its
runner kills by command line whatever DeepSpeed job it finds on the hosts). The processes of a launch are found by
its mark (`signals.py`), on this host and over ssh on the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jp_train.cluster.remote import Answer
from jp_train.cluster.signals import launched_processes, rank_processes, reached, send
from jp_train.cluster.supervision import Supervision, Verdict, ask_hosts, failures_text

KILL_WAIT_S = 15.0
SECOND_SIGNAL_S = 2.0
"""A repeat within this time belongs to the first signal (Ctrl-C may come twice); a later one kills at once."""
SWEEP_WAIT_S = 30.0
"""Seconds that a host which answers has to get rid of killed processes: one that waits for a disk or a device ends
late, and its host is healthy."""
UNWATCHED_S = 60.0
"""Seconds without a finished look at the run folder after which that is reported, and between two such lines."""
SIGNAL_AGAIN_S = 5.0
"""Seconds between two attempts to signal ranks to stop, where none was running yet."""


class StopSignals:
    """The stop signals that this process gets, from `installed` on: the first one stops the run, a later second one
    stops it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False
        self._first_at = 0.0
        self._interrupts = False

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Take the signals for the duration of the block; the handlers before are put back.

        A terminal that goes away (SIGHUP) stops nothing: otherwise the ranks would train on without a launch that
        watches them and starts them again.
        """
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }
        terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: _let_go(terminals))
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """In this block, where no rank runs, a stop signal raises KeyboardInterrupt at once; so does one that came
        before."""
        self._interrupts = True
        try:
            if self.number is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first_at = number, now
        elif now - self._first_at > SECOND_SIGNAL_S:
            self.at_once = True
        if self._interrupts:
            self._interrupts = False  # once: the clean-up after it is not interrupted again
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Ending:
    """How one start ended. `code`: the launcher's, as Popen's. `silent`: remote hosts on which something may be
    left."""

    code: int
    verdict: Verdict | None = None
    silent: Mapping[str, Answer] = field(default_factory=dict)


class Run:
    """The launcher's process in a new session (so that a terminal's Ctrl-C reaches this process alone). `remote`: hosts
    other than this one."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], launch_id: str, remote: Sequence[str], stop: StopSignals,
        *, grace_s: float, supervision: Supervision | None = None, signal_launcher: bool = False,
        notice: Callable[[], None] = lambda: None, output: Path | None = None, ssh_args: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`output`: the file for the launcher's stdout, which has DeepSpeed's messages about itself; what people are to
        read comes on stderr. None: the stdout of this process. `notice` is called after each look at the run
        folder."""
        self._launch_id, self._remote, self._stop, self._grace_s = launch_id, tuple(remote), stop, grace_s
        self._supervision, self._notice, self._ssh_args = supervision, notice, tuple(ssh_args)
        self._signal_launcher = signal_launcher
        """srun passes SIGUSR1 on to all tasks: no ssh is needed."""
        self._nobody_signalled = False
        self._over = threading.Event()
        self._verdict: Verdict | None = None
        self._looked_at, self._reported_at = time.monotonic(), -1e9
        with output.open("ab") if output else contextlib.nullcontext() as file:
            self._process = subprocess.Popen(list(command), env=dict(env), start_new_session=True, stdout=file)

    def wait(self) -> Ending:
        """Block until nothing of the run is left, here and on every host that answers."""
        signalled: set[int] = set()
        deadline: float | None = None
        verdict: Verdict | None = None
        signal_again = 0.0
        watch = threading.Thread(target=self._watch, name="launch-watch", daemon=True)
        watch.start()
        while self._process.poll() is None:
            if self._stop.number is not None and deadline is None:
                deadline = time.monotonic() + self._grace_s
                self._over.set()
                name = signal.Signals(self._stop.number).name
                say(f"{name}: ranks finish their step and save; killed in {self._grace_s:g} s, or by a second signal")
                signalled |= self._stop_ranks(signalled)
                signal_again = time.monotonic() + SIGNAL_AGAIN_S
                if not signalled and not self._remote:
                    os.killpg(self._process.pid, signal.SIGTERM)  # no rank yet, so nothing to save
            if deadline is not None and not self._remote:
                signalled |= self._stop_ranks(signalled)  # a rank that came up after the signal
            if deadline is not None and self._nobody_signalled and time.monotonic() > signal_again:
                signalled |= self._stop_ranks(signalled)
                signal_again = time.monotonic() + SIGNAL_AGAIN_S
            if self._stop.at_once or (deadline is not None and time.monotonic() > deadline):
                say("killing what is left of the run")
                break
            verdict = self._verdict if deadline is None else None
            if verdict is not None:
                say(f"the run is ended: {verdict.cause}")
                break
            if deadline is None and (silence := time.monotonic() - self._looked_at) > UNWATCHED_S:
                self._unwatched(f"its folder has not answered for {silence:.0f} s")
            time.sleep(0.2)
        self._over.set()
        silent = self._leave_nothing(verdict, killed=self._process.poll() is None)
        watch.join(1.0)
        if self._supervision is not None:
            self._supervision.close()
        return Ending(self._process.wait(), verdict, silent)

    def _watch(self) -> None:
        """Look until there is a verdict or the run is over. In a separate thread: a dead file server blocks whoever
        looks, and no stop signal may wait for that.

        A run folder that cannot be read for a while, or a host too full to start ssh, ends no run.
        """
        while not self._over.wait(0.2):
            try:
                self._verdict = self._supervision.look() if self._supervision else None
                if self._verdict is not None:
                    return
                self._notice()
            except Exception as error:
                self._unwatched(f"{type(error).__name__}: {error}")
            self._looked_at = time.monotonic()

    def _unwatched(self, why: str) -> None:
        if time.monotonic() - self._reported_at > UNWATCHED_S:
            self._reported_at = time.monotonic()
            say(f"the run is not watched at the moment: {why}")

    def _stop_ranks(self, signalled: set[int]) -> set[int]:
        """Signal each rank once, as a second signal makes it exit at once. SIGINT is sent as SIGINT, so that the rank's
        exit code shows it. Returns the processes that were signalled here."""
        number = self._stop.number
        assert number is not None
        if self._signal_launcher:
            self._process.send_signal(signal.SIGUSR1)
            return set()
        if self._remote:
            answers = ask_hosts(self._remote, self._launch_id, number, ssh_args=self._ssh_args, timeout_s=60.0)
            if missing := failures_text(answers):
                say(f"not told to stop, its ranks may go on: {missing}")
            # ranks share the signal at the end of a step: one that got it is enough, and a second one would make it
            # exit at once
            self._nobody_signalled = all(answer.ok and reached(answer.stdout) == 0 for answer in answers.values())
            return set()
        return set(send([pid for pid in rank_processes(self._launch_id) if pid not in signalled], number))

    def _leave_nothing(self, verdict: Verdict | None, *, killed: bool) -> dict[str, Answer]:
        """End what is left, on this host and the others. Returns the hosts that did not answer, with the reason.

        `killed`: at once. Otherwise the launcher has ended; ranks that outlive it here (it was killed) may save first.
        """
        if not killed and not self._remote and (left := rank_processes(self._launch_id)):
            say("the launcher died and left ranks behind: they save and exit")
            send(left, self._stop.number or signal.SIGTERM)
            _wait_until(lambda: not rank_processes(self._launch_id) or self._stop.at_once, self._grace_s)
        if not killed:
            _wait_until(lambda: not launched_processes(self._launch_id), KILL_WAIT_S)
        silent: dict[str, Answer] = {}
        if self._remote and (killed or self._process.returncode != 0) and not self._signal_launcher:
            lost = verdict.lost if verdict else ()
            silent = sweep(self._remote, self._launch_id, lost=lost, ssh_args=self._ssh_args)
        if killed and self._signal_launcher:
            self._process.send_signal(signal.SIGTERM)  # srun kills every task
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_WAIT_S)
        send(launched_processes(self._launch_id), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return silent


def sweep(
    hosts: Sequence[str], *launch_ids: str, lost: Collection[str] = (), ssh_args: Sequence[str] = ()
) -> dict[str, Answer]:
    """Kill every process of these launches on these hosts until there is none. Returns the hosts that did not answer,
    or kept some.

    Hosts that may be `lost` are queried once, others that do not answer twice, and those that answer until nothing is
    left, or SWEEP_WAIT_S seconds.
    """
    silent: dict[str, Answer] = {}
    for launch_id in launch_ids:
        queried = [host for host in hosts if host not in silent]
        until, first = time.monotonic() + SWEEP_WAIT_S, True
        while queried:
            answers = ask_hosts(queried, launch_id, signal.SIGKILL, ssh_args=ssh_args)
            left = {host: answer for host, answer in answers.items() if not answer.ok or reached(answer.stdout) != 0}
            over = time.monotonic() > until and not first
            queried = [
                host for host, answer in left.items() if not over and (answer.ok or (first and host not in lost))
            ]
            silent |= {host: answer for host, answer in left.items() if host not in queried}
            first = False
            if queried:
                time.sleep(0.3)
    if silent:
        say(
            f"not known to be free of this run: {failures_text(silent) or ', '.join(silent)}; look there for processes "
            f"of launch {', '.join(launch_ids)}"
        )
    return silent


def say(text: str) -> None:
    """A line of the launch itself, on stderr."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _let_go(terminals: Sequence[int]) -> None:
    """Writing to a terminal that is gone is an error, which would end the launch: what is written goes nowhere
    instead."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)

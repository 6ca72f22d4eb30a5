"""One command on many hosts at a time, over ssh: what each answered, or the cause why it did not.

Shell text is built from quoted words only: the remote shell gets `shlex.quote` of every one, and the host's name has
passed `hostfile.HOST_NAME`, so that it can be no option. ssh never prompts for a password or for trust in a key, and
gives up connecting after a time. A command that outlives its time is ended on its host too (coreutils' `timeout`),
because killing the local ssh alone leaves it running there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from enum import Enum

from jp_train.cluster.environment import NAME
from jp_train.cluster.hostfile import HOST_NAME
from jp_train.errors import LaunchError

CONNECT_TIMEOUT_S = 5.0
ADDRESS_S = 20.0
AT_ONCE = 64
"""ssh processes that run side by side."""
END_WAIT_S = 2.0
LOOK_S = 0.5
SSH_FAILED = 255
TIMED_OUT_THERE = (124, 137)
"""What coreutils' `timeout` returns after its TERM and its KILL."""


class Cause(str, Enum):
    """Why a host gave no answer."""

    UNKNOWN_HOST = "unknown host name"
    NO_ANSWER = "no answer"
    NO_ROUTE = "no route"
    REFUSED = "connection refused"
    HUNG = "ssh server hangs"
    KEY_CHANGED = "host key changed"
    KEY_UNKNOWN = "host key unknown"
    LOGIN = "login refused"
    LOST = "broke off"
    TIMEOUT = "time-out"
    NO_SSH = "no ssh here"

    def __str__(self) -> str:
        return self.value


REMEDIES = {
    Cause.UNKNOWN_HOST: "correct the name in the hostfile, or add {host} to DNS or /etc/hosts of this host",
    Cause.NO_ANSWER: "power {host} on or open its ssh port; or leave it out with --exclude {host}",
    Cause.NO_ROUTE: "power {host} on, or bring its network up (its address answers nobody); or leave it out with "
    "--exclude {host}",
    Cause.REFUSED: "start the ssh server on {host} (`systemctl start ssh`), and see that it listens on the address "
    "that the name resolves to",
    Cause.HUNG: "look at {host} on its console (out of memory, dead file server, stopped sshd) and restart its ssh "
    "server",
    Cause.KEY_CHANGED: "if {host} was installed anew: `ssh-keygen -R {host}` here and log in once by hand; if it was "
    "not, another machine answers under that name",
    Cause.KEY_UNKNOWN: "log in once by hand (`ssh {host} true`) and confirm the key, or add it to known_hosts",
    Cause.LOGIN: "let this user log in by key: `ssh-copy-id {host}`, until `ssh -o BatchMode=yes {host} true` asks for "
    "nothing",
    Cause.LOST: "the connection ended, or the program was killed: look at {host} for its out-of-memory killer "
    "(`dmesg`) and into its ssh server's log",
    Cause.TIMEOUT: "log in to {host} and see what hangs (`ps`, a dead file server), or give more time",
    Cause.NO_SSH: "install the ssh client on this host (Debian: apt-get install openssh-client)",
}

_SIGNS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", Cause.KEY_CHANGED),
    ("Host key verification failed", Cause.KEY_UNKNOWN),
    ("Could not resolve hostname", Cause.UNKNOWN_HOST),
    ("during banner exchange", Cause.HUNG),
    ("Connection refused", Cause.REFUSED),
    ("No route to host", Cause.NO_ROUTE),
    ("Network is unreachable", Cause.NO_ROUTE),
    ("timed out", Cause.NO_ANSWER),
    ("Permission denied", Cause.LOGIN),
    ("Too many authentication failures", Cause.LOGIN),
)


@dataclass(frozen=True)
class Answer:
    """What came back from one host. `cause` is None when the command ran there to its end, whatever its
    `returncode`."""

    host: str
    returncode: int | None
    stdout: str
    stderr: str
    seconds: float
    cause: Cause | None = None

    @property
    def ok(self) -> bool:
        """The command ran, and succeeded."""
        return self.cause is None and self.returncode == 0

    @property
    def summary(self) -> str:
        """In a few words what happened, with the last line that ssh or the command printed."""
        last = last_line(self.stderr)
        what = str(self.cause) if self.cause else f"exit code {self.returncode}"
        return f"{what} after {self.seconds:.1f} s{f': {last[:300]}' if last else ''}"

    @property
    def remedy(self) -> str:
        """What to do about `cause`; empty without one."""
        return REMEDIES[self.cause].format(host=self.host) if self.cause else ""


def shell_text(argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """The text by which a remote shell runs `argv` in folder `cwd` with `env` added, every word and value unchanged.

    Raises LaunchError for a variable that is no name.
    """
    wrong = [name for name in env or {} if not NAME.fullmatch(name)]
    if wrong:
        raise LaunchError(f"environment variable {wrong[0]!r} is not a name of letters, digits and underscores")
    words = ["env", *(f"{name}={value}" for name, value in env.items())] if env else []
    return f"{f'cd {shlex.quote(cwd)} && ' if cwd else ''}exec {shlex.join([*words, *argv])}"


def command_for(
    host: str,
    argv: Sequence[str],
    *,
    local: bool = False,
    ssh_args: Sequence[str] = (),
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> list[str]:
    """The argv that runs `argv` on `host` (`local`: here, without ssh), in folder `cwd`, with `env` added, for at most
    `limit_s` seconds. `ssh_args`: more words for ssh; they come before ours, so that they win.

    Raises LaunchError for a host name that could be an option or shell text, and for a variable that is no name.
    """
    words = [*(["timeout", "-k", "2", f"{limit_s:g}"] if limit_s is not None else []), *argv]
    if local:
        there = [*(["-C", cwd] if cwd else []), *(f"{name}={value}" for name, value in (env or {}).items())]
        return ["env", *there, *words] if there else words
    if not HOST_NAME.fullmatch(host):
        raise LaunchError(f"host name {host!r} is none: expected [user@]name, or an address")
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": f"{max(1, round(min(CONNECT_TIMEOUT_S, limit_s or CONNECT_TIMEOUT_S)))}",
        "ConnectionAttempts": "1",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ControlPath": "none",  # a master connection left in the background would keep our pipes open
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "LogLevel": "ERROR",
    }
    ours = (word for name, value in options.items() for word in ("-o", f"{name}={value}"))
    return ["ssh", "-T", *ssh_args, *ours, "--", host, shell_text(words, cwd=cwd, env=env)]


def run_on_hosts(
    hosts: Iterable[str],
    argv: Sequence[str],
    *,
    timeout_s: float,
    local: Collection[str] = (),
    ssh_args: Sequence[str] = (),
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    text: str = "",
) -> dict[str, Answer]:
    """Run `argv` on all hosts side by side and wait for every one, at most `timeout_s` seconds each. Answers in the
    order of `hosts`. `text` is the input of each.

    Hosts in `local` are this machine: no ssh. Nothing is left behind after a time-out or a KeyboardInterrupt: local
    processes are killed, and the command ends on its host at the latest `timeout_s` seconds after it began there.
    Raises LaunchError as `command_for`.
    """
    commands = {
        host: command_for(host, argv, local=host in local, ssh_args=ssh_args, cwd=cwd, env=env, limit_s=timeout_s)
        for host in hosts
    }
    if not commands:
        return {}
    running = _Running()
    with ThreadPoolExecutor(min(len(commands), AT_ONCE)) as pool:
        try:
            answers = {
                host: pool.submit(_answer_of, running, host, command, timeout_s, host in local, text)
                for host, command in commands.items()
            }
            # in short waits: a signal that comes just as this thread lets go of the interpreter is not noticed before
            # it wakes
            while wait(answers.values(), timeout=LOOK_S).not_done:
                pass
            return {host: answer.result() for host, answer in answers.items()}
        except BaseException:
            running.kill_all()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def first_address(host: str, *, ssh_args: Sequence[str] = ()) -> Answer:
    """The first of a host's own addresses in `stdout`: where DeepSpeed's runner has the ranks meet."""
    answer = run_on_hosts([host], ["hostname", "-I"], timeout_s=ADDRESS_S, ssh_args=ssh_args)[host]
    first = next(iter(last_line(answer.stdout).split()), "")
    if answer.ok and not first:
        return replace(answer, returncode=1, stderr="`hostname -I` names no address; give --master-addr")
    return replace(answer, stdout=first)


def last_line(text: str) -> str:
    """The last line that is not blank; empty without one."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def classify(returncode: int | None, stderr: str) -> Cause | None:
    """Why ssh failed, from its exit code and what it printed; None when the command ran (ssh passes its code on)."""
    if returncode != SSH_FAILED:
        return None
    return next((cause for sign, cause in _SIGNS if sign in stderr), Cause.LOST)


def spawn(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a `command_for` with pipes as text, in a new session, so that a terminal's Ctrl-C reaches this process
    alone. Raises FileNotFoundError."""
    return subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Kill a spawned process with its children, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer_of(
    running: _Running, host: str, command: Sequence[str], timeout_s: float, local: bool, text: str
) -> Answer:
    began = time.monotonic()
    try:
        process = running.start(command)
    except FileNotFoundError as error:
        return Answer(host, None, "", str(error), 0.0, None if local else Cause.NO_SSH)
    if process is None:
        return Answer(host, None, "", "interrupted before it began", 0.0, Cause.TIMEOUT)
    try:
        stdout, stderr = process.communicate(text, timeout=timeout_s + END_WAIT_S)
        code = process.returncode
        cause = None if local else classify(code, stderr)
        if code in TIMED_OUT_THERE and time.monotonic() - began >= timeout_s:
            cause = Cause.TIMEOUT
    except subprocess.TimeoutExpired:
        end(process)
        stdout = stderr = ""
        with contextlib.suppress(subprocess.TimeoutExpired):  # something that left the session may still hold the pipes
            stdout, stderr = process.communicate(timeout=END_WAIT_S)
        code, cause = None, Cause.TIMEOUT
    return Answer(host, code, stdout, stderr, time.monotonic() - began, cause)


class _Running:
    """The local processes of one `run_on_hosts`, so that an interrupt ends all of them and starts no further ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._over = False

    def start(self, command: Sequence[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._over:
                return None
            self._processes.append(spawn(command))
            return self._processes[-1]

    def kill_all(self) -> None:
        with self._lock:
            self._over = True
            for process in self._processes:
                if process.poll() is None:
                    end(process)

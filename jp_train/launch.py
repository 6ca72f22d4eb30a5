"""Hostfile -> checked cluster -> the deepspeed command, run so that signals and exit codes mean what they say.

What DeepSpeed's runner does silently is refused or repaired here (DEEPSPEED.md section 7): a missing hostfile is an error, a filter that
leaves one remote host is not run locally, arguments survive the remote shell, a stop signal reaches every rank at once and only once, and a
rank's exit code comes back. One local host needs no ssh.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train import errors
from jp_train.cluster.hostfile import Host, parse_hostfile, runs_locally, select_slots
from jp_train.cluster.signals import LAUNCH_ID, launched_processes, rank_processes, send
from jp_train.config import batch_plan, load_config
from jp_train.errors import ConfigError, JpTrainError, LaunchError

__all__ = ["Host", "exit_code", "launch", "launch_command", "parse_hostfile", "select_slots"]

DEFAULT_PORT = 29500
DEFAULT_GRACE_S = 600.0
"""Time that the ranks have to finish their step and save after a stop signal, before they are killed."""
KILL_WAIT_S = 15.0
SECOND_SIGNAL_S = 2.0
"""A repeat within this time belongs to the first signal (Ctrl-C may come twice); a later one kills at once."""

PASSED_PREFIXES = (
    "CUDA_",
    "DEEPSPEED_",
    "DS_",
    "FI_",
    "GLOO_",
    "HF_",
    "JP_TRAIN_",
    "NCCL_",
    "OMP_",
    "TOKENIZERS_",
    "TORCH_",
    "TRITON_",
    "WANDB_",
)
PASSED_NAMES = ("LD_LIBRARY_PATH", "XDG_CACHE_HOME")
NOT_PASSED = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
"""Set per host by the launcher, or meant for the runner alone."""
EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_LOOKALIKES = ("TOKENIZERS_",)
SAFE_VALUE = re.compile(r"[\w@%+=:,./ -]*")
"""Values that an `export NAME="value"` on the remote host leaves as they are."""


def launch_command(
    config_path: str | os.PathLike[str],
    overrides: Sequence[str],
    hostfile: str | os.PathLike[str],
    *,
    include: str = "",
    exclude: str = "",
    master_port: int = DEFAULT_PORT,
    launcher: str = "pdsh",
) -> list[str]:
    """The argv that starts the run: DeepSpeed's runner with `-m jp_train train CONFIG key=value ...` on every rank.

    Raises as `ranks_command` does.
    """
    target = ["train", str(config_path), *overrides]
    return ranks_command(target, hostfile, include=include, exclude=exclude, master_port=master_port, launcher=launcher)


def ranks_command(
    target: Sequence[str],
    hostfile: str | os.PathLike[str],
    *,
    include: str = "",
    exclude: str = "",
    master_port: int = DEFAULT_PORT,
    launcher: str = "pdsh",
) -> list[str]:
    """The argv that starts `jp_train TARGET...` on every rank.

    For remote hosts the arguments are quoted for the shell they go through. Raises LaunchError (hostfile, an argument that no quoting can save) or
    ConfigError (filter, launcher, port).
    """
    if launcher != "pdsh":
        raise ConfigError(
            f"launcher {launcher!r} is not supported, only pdsh: with DeepSpeed's mpirun and srun runners the ranks get no RANK, or no `-m`. "
            "Under Slurm make a hostfile and use pdsh, or see launch/slurm.sbatch"
        )
    if not 1024 <= master_port <= 65535:
        raise ConfigError(f"--master-port {master_port} is not between 1024 and 65535")
    selection = select_slots(parse_hostfile(hostfile), include=include, exclude=exclude)
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--master_port", str(master_port)]
    argv += ["--include", include] if include else []
    argv += ["--exclude", exclude] if exclude else []
    if runs_locally(selection):
        argv += ["--no_ssh_check", "--master_addr", "127.0.0.1"]  # else the runner wants an ssh server on this very host
    else:
        argv += ["--launcher", launcher, "--force_multi"]
        target = [remote_argument(argument) for argument in target]
    return [*argv, "--no_local_rank", "--module", "jp_train", *target]


def remote_argument(argument: str) -> str:
    """`argument` in the form in which DeepSpeed's pdsh runner and the shell behind it deliver it unchanged.

    The runner wraps an argument with a space in double quotes (escaping `"`) and passes any other one raw to the remote shell.
    """
    spaced = " " in argument
    forbidden = set("\n\r%") | (set("$`\\") if spaced else set())
    found = sorted(forbidden & set(argument))
    if found:
        raise LaunchError(
            f"argument {argument!r} cannot be passed to remote hosts: {found[0]!r} would be changed on the way"
            f"{' (beside a space)' if spaced else ''}; write the value into the configuration file"
        )
    return argument if spaced else shlex.quote(argument)


@dataclass(frozen=True)
class PassedEnvironment:
    """What remote ranks get of this shell's environment, and what is held back: secrets, and values that a shell would change."""

    lines: tuple[str, ...]
    secrets: tuple[str, ...]
    unsafe: tuple[str, ...]

    def text(self) -> str:
        """The `.deepspeed_env` file: one NAME=value a line; a comment or a blank line would crash the runner."""
        return "".join(f"{line}\n" for line in self.lines)


def passed_environment(environ: Mapping[str, str]) -> PassedEnvironment:
    """Choose by name what remote ranks inherit. Secrets never: the runner would show them in every process list of the cluster."""
    lines, secrets, unsafe = [], [], []
    for name, value in sorted(environ.items()):
        if name in NOT_PASSED or not (name.startswith(PASSED_PREFIXES) or name in PASSED_NAMES):
            continue
        if is_secret(name):
            secrets.append(name)
        elif not SAFE_VALUE.fullmatch(value) or not value:
            unsafe.append(name)
        else:
            lines.append(f"{name}={value}")
    return PassedEnvironment(tuple(lines), tuple(secrets), tuple(unsafe))


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one."""
    return bool(SECRET.search(name)) and not name.startswith(SECRET_LOOKALIKES)


def runner_environment(environ: Mapping[str, str], launch_id: str, *, local: bool) -> dict[str, str]:
    """The environment of the runner (and, locally, of the ranks): this one, the launch's mark, and CPU settings where there is no GPU.

    For remote hosts, what the runner would export on its own is taken out where it is secret or not safe.
    """
    env = {**environ, LAUNCH_ID: launch_id}
    if local and not _has_gpu():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", "1")  # two ranks with two threads each on two busy cores are 20 times slower (FACTS.md)
    if not local:
        for name in list(env):
            if name.startswith(EXPORTED_BY_DEEPSPEED) and (is_secret(name) or not SAFE_VALUE.fullmatch(env[name])):
                del env[name]
    return env


def launch(
    config_path: str | os.PathLike[str],
    overrides: Sequence[str],
    hostfile: str | os.PathLike[str],
    *,
    include: str = "",
    exclude: str = "",
    master_port: int = DEFAULT_PORT,
    launcher: str = "pdsh",
    dry_run: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
) -> int:
    """Check everything that can be known, print the batch arithmetic and the command, run it, and return the ranks' exit code.

    SIGTERM, SIGINT and SIGUSR1 go to every rank at once; the ranks save and exit, or are killed after `grace_s` seconds or by a second signal.
    `dry_run` stops after printing and returns 0. Raises ConfigError (configuration, filter, world size that does not divide the rows) and LaunchError
    (hostfile, busy port, missing pdsh, a rank killed from outside).
    """
    cfg = load_config(config_path, overrides)
    selection = select_slots(parse_hostfile(hostfile), include=include, exclude=exclude)
    resumes = any((Path(cfg.run_dir) / "checkpoints").glob("step_*"))  # then the micro-batch follows the number of ranks
    return launch_ranks(
        ["train", str(config_path), *overrides], hostfile, include=include, exclude=exclude, master_port=master_port, launcher=launcher,
        dry_run=dry_run, grace_s=grace_s, facts=batch_plan(cfg, sum(map(len, selection.values())), shrink=resumes).describe(),
        status_file=Path(cfg.run_dir) / "status.json",
    )  # fmt: skip


def launch_ranks(
    target: Sequence[str],
    hostfile: str | os.PathLike[str],
    *,
    include: str = "",
    exclude: str = "",
    master_port: int = DEFAULT_PORT,
    launcher: str = "pdsh",
    dry_run: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    facts: str = "",
    status_file: Path | None = None,
) -> int:
    """Run `jp_train TARGET...` on every slot of a hostfile and return the ranks' exit code; `facts` is printed before the command.

    Signals, `dry_run` and errors as in `launch`. `status_file`: where the ranks tell why they failed.
    """
    selection = select_slots(parse_hostfile(hostfile), include=include, exclude=exclude)
    command = ranks_command(target, hostfile, include=include, exclude=exclude, master_port=master_port, launcher=launcher)
    world = sum(map(len, selection.values()))
    local = runs_locally(selection)
    launch_id = uuid.uuid4().hex[:16]
    env = runner_environment(os.environ, launch_id, local=local)
    passed = passed_environment(env)
    out = sys.stdout if dry_run else sys.stderr
    print(f"{world} ranks on {_describe(selection)}{' (this host)' if local else ''}", file=out)
    if facts:
        print(facts, file=out)
    if not local:
        print(f"environment of the ranks: {' '.join(passed.lines)}", file=out)
        for names, why in (
            (passed.secrets, "it looks secret; log in on the hosts instead"),
            (passed.unsafe, "a remote shell would change it"),
        ):
            for name in names:
                print(f"not passed on: {name} ({why})", file=out)
    print(f"command: {shlex.join(command)}", file=out, flush=True)
    if dry_run:
        return 0
    _check_ready(selection, master_port, local=local)
    started = time.time()
    with _environment_file(passed) as path:
        code, stopped_by = _Running(command, env | {"DS_ENV_FILE": str(path)}, launch_id, () if local else tuple(selection), grace_s).wait()
    return exit_code(code, stopped_by, "" if status_file is None else _failure(status_file, since=started))


def exit_code(code: int, stopped_by: int | None, failure: str) -> int:
    """The run's exit code from the runner's: 0 and jp_train's own codes pass; 128 + n after signal n.

    Which rank's code the runner reports is a matter of milliseconds: when rank 0 fails, the others fail because it is gone. So an unspecific 1 is
    replaced by the code of `failure`, the error class that status.json names. Raises LaunchError for a rank that was killed from outside.
    """
    known = {cls.__name__: cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, JpTrainError)}
    if code == 0 or code in (2, 3, 4, 5):
        return code
    if stopped_by is not None:
        return 128 + stopped_by
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGUSR1):
        return code
    if code == 1 or known.get(failure, 1) != 1:
        return known.get(failure, 1)
    number = -code if code < 0 else 256 - code
    if 0 < number < 65:
        name = signal.Signals(number).name if number in {s.value for s in signal.Signals} else f"signal {number}"
        hint = "; the kernel's out-of-memory killer does this: see dmesg" if number == signal.SIGKILL else ""
        raise LaunchError(
            f"a process of the run was killed by {name}{hint}. Run the same command again to resume from the newest checkpoint"
        )
    return code


class _Running:
    """The runner in a session of its own (so that a terminal's Ctrl-C comes to us alone), and the way to stop what it started."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], launch_id: str, remote: tuple[str, ...], grace_s: float) -> None:
        self._launch_id, self._remote, self._grace_s = launch_id, remote, grace_s
        self._signal: int | None = None
        self._kill_now = False
        self._first_at = 0.0
        self._env = dict(env)
        before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        self._before = before
        self._process = subprocess.Popen(list(command), env=self._env, start_new_session=True)

    def wait(self) -> tuple[int, int | None]:
        """Block until nothing of the run is left. Returns the runner's code and the signal that stopped the run, if any."""
        told: set[int] = set()
        deadline = None
        try:
            while self._process.poll() is None:
                if self._signal is not None and deadline is None:
                    deadline = time.monotonic() + self._grace_s
                    _say(
                        f"{signal.Signals(self._signal).name}: ranks finish their step and save; killed in {self._grace_s:g} s, or by a second signal"
                    )
                    told |= self._stop_ranks(told)
                    if not told and not self._remote:
                        os.killpg(self._process.pid, signal.SIGTERM)  # no rank yet, so nothing to save
                if deadline is not None and not self._remote:
                    told |= self._stop_ranks(told)  # a rank that came up after the signal
                if self._kill_now or (deadline is not None and time.monotonic() > deadline):
                    self._kill()
                    break
                time.sleep(0.2)
            self._process.wait()
            self._leave_nothing()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        return self._process.returncode, self._signal

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._first_at = number, now
        elif now - self._first_at > SECOND_SIGNAL_S:
            self._kill_now = True

    def _stop_ranks(self, told: set[int]) -> set[int]:
        """Signal each rank once: a second signal means `exit at once` to it. SIGINT is sent as SIGINT, so that the rank's code tells."""
        assert self._signal is not None
        if self._remote:
            self._on_hosts(self._signal)
            return set()
        return set(send([pid for pid in rank_processes(self._launch_id) if pid not in told], self._signal))

    def _on_hosts(self, number: int) -> None:
        inner = shlex.join([sys.executable, "-m", "jp_train.cluster.signals", self._launch_id, str(number)])
        root = Path(__file__).resolve().parent.parent
        command = ["pdsh", "-R", "ssh", "-S", "-w", ",".join(self._remote), f"cd {shlex.quote(str(root))} && {inner}"]
        try:
            subprocess.run(command, timeout=60, check=False, stdout=sys.stderr)
        except subprocess.TimeoutExpired:
            _say("a host did not answer within 60 s: its ranks may go on; look there for processes of this run")

    def _kill(self) -> None:
        _say("killing what is left of the run")
        if self._remote:
            self._on_hosts(signal.SIGKILL)
        send(launched_processes(self._launch_id), signal.SIGKILL)

    def _leave_nothing(self) -> None:
        """The runner is gone. Ranks that outlive it (it was killed) are stopped, so that no unsupervised training goes on."""
        left = [] if self._remote else rank_processes(self._launch_id)
        if left:
            _say("the launcher died and left ranks behind: they save and exit")
            send(left, self._signal or signal.SIGTERM)
            deadline = time.monotonic() + self._grace_s
            while rank_processes(self._launch_id) and time.monotonic() < deadline:
                time.sleep(0.2)
        until = time.monotonic() + KILL_WAIT_S
        while launched_processes(self._launch_id) and time.monotonic() < until:
            time.sleep(0.2)
        send(launched_processes(self._launch_id), signal.SIGKILL)


def _check_ready(selection: Mapping[str, Sequence[int]], port: int, *, local: bool) -> None:
    if not local:
        if shutil.which("pdsh") is None:
            raise LaunchError(
                "pdsh is not installed on this host, and the hostfile names remote hosts; install it (Debian: apt-get install pdsh openssh-client)"
            )
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise LaunchError(f"port {port} is in use on this host, perhaps by another run; give another one with --master-port") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    slots = ",".join(map(str, next(iter(selection.values()))))
    if visible and visible != slots and _has_gpu():
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={visible} is set, but the launcher would use devices {slots} of the hostfile; unset it and choose with --include, "
            "or give the hostfile as many slots as there are devices"
        )


def _has_gpu() -> bool:
    """By the driver's device files (NVIDIA, AMD): importing torch to ask it takes seconds, and the ranks ask it anyway."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def _describe(selection: Mapping[str, Sequence[int]]) -> str:
    if len(selection) > 4:
        counts = sorted({len(slots) for slots in selection.values()})
        return f"{len(selection)} hosts with {' or '.join(map(str, counts))} slots ({next(iter(selection))} first)"
    return ", ".join(f"{name} (slots {','.join(map(str, slots))})" for name, slots in selection.items())


@contextmanager
def _environment_file(passed: PassedEnvironment) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jp_train_launch_") as folder:
        path = Path(folder) / "deepspeed_env"
        path.write_text(passed.text(), encoding="utf-8")
        yield path


def _failure(status_file: Path, *, since: float) -> str:
    """The error class that this run's status.json names as its end; empty without one."""
    try:
        told = json.loads(status_file.read_text(encoding="utf-8"))
        fresh = told["state"] == "failed" and float(told["updated"]) >= since
        return str(told["reason"]).partition(":")[0] if fresh else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)

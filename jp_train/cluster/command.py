"""The one command that starts all ranks: DeepSpeed's runner on this host, or pdsh, mpirun or srun.

The last three are called directly, as DeepSpeed's runner for pdsh lets the remote shell change values and arguments,
and those for the others start ranks without RANK or without `-m`. pdsh starts DeepSpeed's launcher on every host, as
its runner does; whatever starts a rank, it starts `jp_train.cluster.rank`, which finds out the rank's number and keeps
its log.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Sequence

from jp_train.cluster.environment import PassedEnvironment
from jp_train.cluster.hostfile import Selection, runs_locally, world_size
from jp_train.cluster.options import LaunchOptions, filter_text
from jp_train.cluster.remote import shell_text
from jp_train.errors import ConfigError, LaunchError

RANK_MODULE = "jp_train.cluster.rank"
WORLD = "JP_TRAIN_WORLD"
"""Host and slot of every rank, as a filter: for `jp_train.cluster.rank`."""
AT_ONCE = 1024
"""Hosts that pdsh reaches at once: it must reach all, as it waits for those it has reached."""
LOGS = "JP_TRAIN_LOGS"
"""Folder of the launch's logs; absent where none are kept."""


def ranks_command(target: Sequence[str], options: LaunchOptions, passed: PassedEnvironment) -> list[str]:
    """The argv that starts `jp_train TARGET...` on every rank, for remote hosts with the variables `passed`.

    Raises LaunchError (hostfile) or ConfigError (filter, or hosts and slots that the launcher cannot express).
    """
    selection = options.selection()
    if runs_locally(selection):
        return _runner(target, options)
    if options.launcher == "pdsh":
        return _pdsh(selection, target, options, passed)
    if odd := [host for host in selection if "@" in host or ":" in host]:
        raise ConfigError(
            f"--launcher {options.launcher} cannot take {odd[0]} of the hostfile; give the host a name without user "
            "(`Host`, `User` and `HostName` in ~/.ssh/config, or /etc/hosts), or use --launcher pdsh"
        )
    rank = [sys.executable, "-u", "-m", RANK_MODULE, *target]
    more = shlex.split(options.launcher_args)
    if options.launcher == "openmpi":
        ssh = options.ssh_words()
        return [*_mpirun(selection, passed), *(["--mca", "plm_rsh_args", " ".join(ssh)] if ssh else []), *more, *rank]
    return [*_srun(selection), *more, *rank]


def rank_variables(options: LaunchOptions, logs: str) -> dict[str, str]:
    """What `jp_train.cluster.rank` needs in its environment, whatever starts it."""
    selection = options.selection()
    variables = {WORLD: filter_text(selection)} | ({LOGS: logs} if logs else {})
    if options.launcher != "pdsh" and not runs_locally(selection):
        variables |= {
            "JP_TRAIN_MASTER_ADDR": options.master_addr or next(iter(selection)),
            "JP_TRAIN_MASTER_PORT": str(options.master_port),
        }
    return variables


def _runner(target: Sequence[str], options: LaunchOptions) -> list[str]:
    (host,) = options.selection()
    if not any(line.split()[:1] == [host] for line in options.hostfile.read_text(encoding="utf-8").splitlines()):
        raise LaunchError(
            f"{options.hostfile} has {host}, this host, in a range, which DeepSpeed's runner here does not read; give "
            "it a line of its own"
        )
    argv = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(options.hostfile),
        "--master_port", str(options.master_port),
    ]  # fmt: skip
    argv += ["--include", options.include] if options.include else []
    argv += ["--exclude", options.exclude] if options.exclude else []
    # else the runner wants an ssh server on this very host
    argv += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    return [*argv, "--no_local_rank", "--module", RANK_MODULE, *target]


def _pdsh(selection: Selection, target: Sequence[str], options: LaunchOptions, passed: PassedEnvironment) -> list[str]:
    """DeepSpeed's per-host launcher on every host. pdsh replaces %n by the host's number, and %% by %."""
    world = base64.urlsafe_b64encode(json.dumps({host: list(slots) for host, slots in selection.items()}).encode())
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world.decode()}"]
    # `launch` has asked the first host for its address; --dry-run asks nobody
    address = options.master_addr or f"FIRST_ADDRESS_OF_{next(iter(selection))}"
    rest = [f"--master_addr={address}", f"--master_port={options.master_port}", "--no_local_rank", "--module"]
    start = shell_text(launcher, cwd=os.getcwd(), env=passed.variables).replace("%", "%%")
    end = shlex.join([*rest, RANK_MODULE, *target]).replace("%", "%%")
    return ["pdsh", "-S", "-R", "ssh", "-f", str(AT_ONCE), "-w", ",".join(selection), f"{start} --node_rank=%n {end}"]


def _mpirun(selection: Selection, passed: PassedEnvironment) -> list[str]:
    world = world_size(selection)
    argv = ["mpirun", "-n", str(world), "--host", ",".join(f"{host}:{len(slots)}" for host, slots in selection.items())]
    # not bound to cores: a rank's threads and loader workers use those that are free
    argv += ["--map-by", "slot", "--bind-to", "none", "--wdir", os.getcwd()]
    argv += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    for name in passed.variables:
        # the values come from mpirun's own environment, not from its command line
        argv += ["-x", name]
    return argv


def _srun(selection: Selection) -> list[str]:
    counts = {len(slots) for slots in selection.values()}
    if len(counts) > 1:
        listed = ", ".join(f"{host} {len(slots)}" for host, slots in selection.items())
        raise ConfigError(
            f"srun starts the same number of ranks on every host, found {listed}; choose slots alike, or use "
            "--launcher pdsh"
        )
    hosts, each = len(selection), counts.pop()
    # block: ranks in the order of the hosts, as everywhere else; one rank that fails ends the step; lines appear as
    # they are written
    return [
        "srun", "--nodes", str(hosts), "--ntasks", str(hosts * each), "--ntasks-per-node", str(each),
        "--nodelist", ",".join(selection), "--distribution", "block", "--kill-on-bad-exit=1", "--unbuffered",
        "--export", "ALL", "--chdir", os.getcwd(),
    ]  # fmt: skip

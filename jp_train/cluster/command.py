"""The one command that starts all ranks: DeepSpeed's runner (on this host, or through pdsh), mpirun, or srun.

What DeepSpeed's runner does silently is repaired here (docs/zero3.md, rule 8): a filter that leaves one remote host is
not run locally, and arguments survive the remote shell. mpirun and srun are called directly, as DeepSpeed's own runners
for them start ranks without RANK or without `-m`; whatever starts a rank, it starts `jp_train.cluster.rank`, which
finds out the rank's number and keeps its log.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from jp_train.cluster.environment import PassedEnvironment
from jp_train.cluster.hostfile import runs_locally, world_size
from jp_train.cluster.options import LaunchOptions, filter_text
from jp_train.errors import ConfigError, LaunchError

RANK_MODULE = "jp_train.cluster.rank"
WORLD = "JP_TRAIN_WORLD"
"""Host and slot of every rank, as a filter: for `jp_train.cluster.rank`."""
LOGS = "JP_TRAIN_LOGS"
"""Folder of the launch's logs; absent where none are kept."""


def ranks_command(target: Sequence[str], options: LaunchOptions, passed: PassedEnvironment | None = None) -> list[str]:
    """The argv that starts `jp_train TARGET...` on every rank. `passed`: for mpirun, which takes the names of the
    variables.

    Raises LaunchError (hostfile, an argument that no quoting can save) or ConfigError (filter, or slots that the
    launcher cannot express).
    """
    selection = options.selection()
    if options.launcher == "pdsh" or runs_locally(selection):
        return _runner_command(target, options, local=runs_locally(selection))
    rank = [sys.executable, "-u", "-m", RANK_MODULE, *target]
    more = shlex.split(options.launcher_args)
    if options.launcher == "openmpi":
        return [*_mpirun(selection, passed), *more, *rank]
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


def remote_argument(argument: str) -> str:
    """`argument` in the form in which DeepSpeed's pdsh runner and the shell behind it deliver it unchanged.

    The runner wraps an argument with a space in double quotes (escaping `"`) and passes any other one raw to the remote
    shell.
    """
    spaced = " " in argument
    forbidden = set("\n\r%") | (set("$`\\") if spaced else set())
    changed = sorted(forbidden & set(argument))
    if changed:
        raise LaunchError(
            f"argument {argument!r} cannot be passed to remote hosts: {changed[0]!r} would be changed on the way"
            f"{' (beside a space)' if spaced else ''}; write the value into the configuration file"
        )
    return argument if spaced else shlex.quote(argument)


def _runner_command(target: Sequence[str], options: LaunchOptions, *, local: bool) -> list[str]:
    argv = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(options.hostfile),
        "--master_port",
        str(options.master_port),
    ]
    argv += ["--include", options.include] if options.include else []
    argv += ["--exclude", options.exclude] if options.exclude else []
    if local:
        # else the runner wants an ssh server on this very host
        argv += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        argv += ["--master_addr", options.master_addr] if options.master_addr else []
        argv += ["--launcher", "pdsh", "--force_multi"]
        target = [remote_argument(argument) for argument in target]
    return [*argv, "--no_local_rank", "--module", RANK_MODULE, *target]


def _mpirun(selection: Mapping[str, Sequence[int]], passed: PassedEnvironment | None) -> list[str]:
    world = world_size(selection)
    argv = ["mpirun", "-n", str(world), "--host", ",".join(f"{host}:{len(slots)}" for host, slots in selection.items())]
    # not bound to cores: a rank's threads and loader workers use those that are free
    argv += ["--map-by", "slot", "--bind-to", "none", "--wdir", os.getcwd()]
    argv += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    for line in passed.lines if passed else ():
        # the values come from mpirun's own environment, not from its command line
        argv += ["-x", line.partition("=")[0]]
    return argv


def _srun(selection: Mapping[str, Sequence[int]]) -> list[str]:
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

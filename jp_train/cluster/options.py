"""The options of a launch, in one object that is passed to everything below `jp_train.cluster.launch`."""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jp_train.cluster.hostfile import HOST_NAME, parse_hostfile, runs_locally, select_slots
from jp_train.errors import ConfigError, LaunchError

LAUNCHERS = ("pdsh", "openmpi", "slurm")
PDSH_SSH_ARGS = "PDSH_SSH_ARGS_APPEND"
"""The variable by which pdsh takes more words for ssh; what it says holds for every ssh."""
DEFAULT_PORT = 29500
DEFAULT_GRACE_S = 600.0
DEFAULT_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Which slots of which hosts run the ranks, and how they are started, watched and started again."""

    hostfile: Path
    include: str = ""
    """Only these hosts or slots, `host1@host2:0,2`."""
    exclude: str = ""
    master_port: int = DEFAULT_PORT
    """Port of the rendezvous on the first host."""
    choose_port: bool = False
    """Where `master_port` is taken and the run is one local host, `with_free_port` takes another one."""
    master_addr: str = ""
    """The first host's address for the other hosts; empty: what its `hostname -I` names first."""
    launcher: str = "pdsh"
    """How remote ranks are started: one of LAUNCHERS. One local host needs none."""
    launcher_args: str = ""
    """More words for mpirun or srun, split as a shell would."""
    ssh_args: str = ""
    """More words for every ssh, such as `-p 2222 -i KEY`, split at blanks; after those of PDSH_SSH_ARGS_APPEND."""
    env: Sequence[str] = ()
    """Names of further variables of this shell that the ranks get."""
    dry_run: bool = False
    grace_s: float = DEFAULT_GRACE_S
    """Time that the ranks have to finish their step and save after a stop signal, before they are killed."""
    skip_preflight: bool = False
    max_restarts: int = 0
    """Times that a run which a host or a rank has ended is started again."""
    patience_s: float = DEFAULT_PATIENCE_S
    """Seconds that a host may give no sign of life before it is queried, and that ranks may outlive one that failed
    before they are ended."""

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ConfigError(f"launcher {self.launcher!r} is not known; it is one of {', '.join(LAUNCHERS)}")
        if not 1024 <= self.master_port <= 65535:
            raise ConfigError(f"--master-port {self.master_port} is not between 1024 and 65535")
        if self.master_addr and ("@" in self.master_addr or not HOST_NAME.fullmatch(self.master_addr)):
            raise ConfigError(f"--master-addr {self.master_addr!r} is no host name and no address")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts} is negative")
        for option, seconds in (("--grace", self.grace_s), ("--patience", self.patience_s)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"{option} {seconds:g} is not a number of seconds above 0")
        if self.launcher_args and self.launcher == "pdsh":
            raise ConfigError(
                f"--launcher-args {self.launcher_args!r} is for mpirun and srun, and pdsh takes none; add --launcher "
                "openmpi or slurm"
            )
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            raise ConfigError(f"--launcher-args {self.launcher_args!r} does not split into words: {error}") from None
        # pdsh and mpirun split them at blanks, and pdsh replaces %h and %u
        if re.search(r"""[%"'\\]|^\s*[^\s-]""", self.ssh_args):
            raise ConfigError(
                f"--ssh-args {self.ssh_args!r}: expected options of ssh without quotes, backslashes and %, for example "
                '--ssh-args "-p 2222"; write others into ~/.ssh/config'
            )

    def ssh_words(self) -> list[str]:
        """More words for every ssh of this launch."""
        return f"{os.environ.get(PDSH_SSH_ARGS, '')} {self.ssh_args}".split()

    def selection(self) -> dict[str, tuple[int, ...]]:
        """The slots that the run uses on each host, in rank order. Raises LaunchError (hostfile) and ConfigError
        (filter)."""
        return select_slots(parse_hostfile(self.hostfile), include=self.include, exclude=self.exclude)

    def restricted(self, selection: Mapping[str, Sequence[int]]) -> LaunchOptions:
        """The same launch on these slots only; `master_addr` stays only if the first host does, whose address it is."""
        kept = not self.master_addr or next(iter(selection), "") == next(iter(self.selection()))
        return replace(self, include=filter_text(selection), exclude="", master_addr=self.master_addr if kept else "")

    def with_free_port(self) -> LaunchOptions:
        """These options; with `choose_port`, for one local host, on a port that nobody listens on. Raises as
        `selection`."""
        if not self.choose_port or not runs_locally(self.selection()) or port_is_free(self.master_port):
            return self
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            return replace(self, master_port=int(probe.getsockname()[1]))

    def require_port(self) -> None:
        """Raise LaunchError where the run is one local host, and somebody listens on its port. (Of other hosts,
        preflight knows.)"""
        if runs_locally(self.selection()) and not port_is_free(self.master_port):
            raise LaunchError(
                f"port {self.master_port} is in use on this host, perhaps by another run; give another one with "
                "--master-port"
            )


def port_is_free(port: int) -> bool:
    """Whether nobody listens on this TCP port of any address of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def filter_text(selection: Mapping[str, Sequence[int]]) -> str:
    """The filter that names exactly these slots: `node1:0,1@node2:0`."""
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in selection.items())


def ranks_of(text: str) -> list[tuple[str, int]]:
    """Host and slot of every rank, from a `filter_text`."""
    return [
        (host, int(slot)) for host, slots in re.findall(r"(.+?):([\d,]+)(?:@|$)", text) for slot in slots.split(",")
    ]

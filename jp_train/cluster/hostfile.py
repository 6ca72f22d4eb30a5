"""Hostfiles and filters: which slots of which hosts a run uses. Stricter than DeepSpeed's parser, and every fault
has its line number."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jp_train.errors import ConfigError, LaunchError

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
"""Letters, digits, dots, dashes, underscores, no dash in front: the name is put into ssh and pdsh command lines."""


Selection = Mapping[str, tuple[int, ...]]
"""The slots that a run uses on each host, in rank order."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: `slots` is the number of ranks (GPUs) on the host."""

    name: str
    slots: int


def parse_hostfile(path: str | os.PathLike[str]) -> list[Host]:
    """The hosts of a DeepSpeed hostfile, in rank order: `name slots=N` a line, `#` comments and blank lines.

    Raises LaunchError with the line number and what is wrong: missing or empty file, a line of another form, no slots,
    a repeated host, a name with characters that a shell would interpret.
    """
    path = Path(path)
    if not path.is_file():
        raise LaunchError(
            f"hostfile {path} is not there; expected a file with `name slots=N` lines (see hostfiles/README.md)"
        )
    hosts: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"hostfile {path}, line {number}: {text!r}"
        match = HOST_LINE.fullmatch(text)
        if not match:
            raise LaunchError(
                f"{where}: expected `name slots=N` with a whole number N, and nothing else but a # comment"
            )
        name, slots = match[1], int(match[2])
        if not HOST_NAME.fullmatch(name):
            raise LaunchError(
                f"{where}: host name {name!r} has characters other than letters, digits, dot, dash and underscore; "
                "write the plain name or address"
            )
        if slots == 0:
            raise LaunchError(f"{where}: 0 slots; give the number of GPUs, or comment the line out")
        if name in hosts:
            raise LaunchError(
                f"{where}: host {name} is already on line {hosts[name][1]}; write every host once, with all its slots"
            )
        hosts[name] = (slots, number)
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host; expected at least one `name slots=N` line")
    return [Host(name, slots) for name, (slots, _) in hosts.items()]


def select_slots(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> dict[str, tuple[int, ...]]:
    """The slots that a run uses on each host, after a filter in DeepSpeed's form `host1@host2:0,2`.

    Raises ConfigError for both filters at once, an unknown host or slot, a filter of another form, or nothing left.
    """
    everything = {host.name: tuple(range(host.slots)) for host in hosts}
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other; give one of them")
    if not include and not exclude:
        return everything
    option = "--include" if include else "--exclude"
    named: dict[str, set[int]] = {}
    for part in (include or exclude).split("@"):
        name, _, numbers = part.partition(":")
        if name not in everything:
            raise ConfigError(
                f"{option} {include or exclude!r}: host {name!r} is not in the hostfile; it has {', '.join(everything)}"
            )
        if ":" in part and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ConfigError(f"{option} {include or exclude!r}: {part!r} is not of the form host or host:0,1")
        slots = {int(n) for n in numbers.split(",")} if numbers else set(everything[name])
        unknown = sorted(slots - set(everything[name]))
        if unknown:
            raise ConfigError(
                f"{option} {include or exclude!r}: host {name} has no slot {unknown[0]}; its slots are 0 to "
                f"{len(everything[name]) - 1}"
            )
        named.setdefault(name, set()).update(slots)
    chosen = {
        name: tuple(slot for slot in slots if (slot in named.get(name, ())) == bool(include))
        for name, slots in everything.items()
    }
    if not any(chosen.values()):
        raise ConfigError(f"{option} {include or exclude!r} leaves no slot of the hostfile")
    return {name: slots for name, slots in chosen.items() if slots}


def world_size(selection: Mapping[str, Sequence[int]]) -> int:
    """Ranks on these slots: one each."""
    return sum(map(len, selection.values()))


def runs_locally(selection: Mapping[str, Sequence[int]]) -> bool:
    """Whether the run is one host, and that host is this one."""
    return len(selection) == 1 and next(iter(selection)) in ("localhost", "127.0.0.1", socket.gethostname())

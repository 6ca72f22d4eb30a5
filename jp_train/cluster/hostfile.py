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
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*"
HOST_NAME = re.compile(rf"(?:[A-Za-z_][A-Za-z0-9._-]*@)?(?:{_LABEL}|{_IPV6})")
"""`[user@]name`, or an address: letters, digits, dots, dashes, underscores, no dash in front, and colons in an IPv6
address: the name is put into ssh and pdsh command lines."""
RANGES = re.compile(r"\[([0-9,-]+)\]")
MOST_SLOTS = 64
MOST_HOSTS = 4096

Selection = Mapping[str, tuple[int, ...]]
"""The slots that a run uses on each host, in rank order."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: `slots` is the number of ranks (GPUs) on the host."""

    name: str
    slots: int


def parse_hostfile(path: str | os.PathLike[str]) -> list[Host]:
    """The hosts of a DeepSpeed hostfile, in rank order: `[user@]name slots=N` a line, `#` comments and blank lines. A
    name may stand for many, as Slurm and pdsh write them: `node[01-16]`, `node[01-03,07]`.

    Raises LaunchError with the line number and what is wrong: missing or empty file, a line of another form, a number
    of slots that no host has, a repeated host, a name with characters that a shell would interpret.
    """
    path = Path(path)
    if not path.is_file():
        raise LaunchError(
            f"hostfile {path} is not there; expected a file with `name slots=N` lines (see hostfiles/README.md)"
        )
    hosts: list[Host] = []
    lines: dict[str, int] = {}
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
        slots = int(match[2])
        if not 1 <= slots <= MOST_SLOTS:
            raise LaunchError(
                f"{where}: {slots} slots; give the host's number of GPUs, 1 to {MOST_SLOTS}, or comment the line out"
            )
        try:
            names = expand(match[1])
        except ValueError as error:
            raise LaunchError(f"{where}: {error}") from None
        for name in names:
            plain = name.rpartition("@")[2].lower()
            if plain in lines:
                raise LaunchError(
                    f"{where}: host {name} is already on line {lines[plain]}; write every host once, with all its slots"
                )
            lines[plain] = number
            hosts.append(Host(name, slots))
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host; expected at least one `name slots=N` line")
    return hosts


def expand(text: str) -> list[str]:
    """The host names that one stands for: `node[01-03,07]` for four, `[fd00::1]` for the address, any other for itself.

    Raises ValueError for a range that is none, and for a name that is no HOST_NAME.
    """
    text = re.sub(rf"\[({_IPV6})\]", r"\1", text)
    names = [text]
    while (match := RANGES.search(names[0])) is not None:
        numbers: list[str] = []
        for part in match[1].split(","):
            first, dash, last = part.partition("-")
            last = last if dash else first
            if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
                raise ValueError(f"[{match[1]}] is no list of numbers and ranges, as [01-16] and [1,3-5] are")
            if int(last) - int(first) >= MOST_HOSTS:
                raise ValueError(f"[{match[1]}] stands for more than {MOST_HOSTS} hosts")
            numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        if len(names) * len(numbers) > MOST_HOSTS:
            raise ValueError(f"{text} stands for more than {MOST_HOSTS} hosts")
        names = [RANGES.sub(number, name, count=1) for name in names for number in numbers]
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(
                f"host name {name!r} has characters other than letters, digits, dot, dash and underscore, or begins "
                "with another than a letter or digit; write the plain [user@]name or address, and ranges as [01-16]"
            )
    return names


def select_slots(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> dict[str, tuple[int, ...]]:
    """The slots that a run uses on each host, after a filter in DeepSpeed's form `host1@host2:0,2`, with ranges
    `node[01-03]` too.

    Raises ConfigError for both filters at once, an unknown host or slot, a filter of another form, or nothing left.
    """
    everything = {host.name: tuple(range(host.slots)) for host in hosts}
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other; give one of them")
    if not include and not exclude:
        return everything
    option = f"--include {include!r}" if include else f"--exclude {exclude!r}"
    named: dict[str, set[int]] = {}
    for part in _parts(include or exclude, everything):
        for name, slots in _filtered(part, option, everything):
            unknown = sorted(slots - set(everything[name]))
            if unknown:
                raise ConfigError(
                    f"{option}: host {name} has no slot {unknown[0]}; its slots are 0 to {len(everything[name]) - 1}"
                )
            named.setdefault(name, set()).update(slots)
    chosen = {
        name: tuple(slot for slot in slots if (slot in named.get(name, ())) == bool(include))
        for name, slots in everything.items()
    }
    if not any(chosen.values()):
        raise ConfigError(f"{option} leaves no slot of the hostfile")
    return {name: slots for name, slots in chosen.items() if slots}


def _parts(text: str, everything: Mapping[str, object]) -> list[str]:
    """The `host` and `host:0,1` of a filter; in `user@host` the @ does not part them."""
    users = {name.partition("@")[0] for name in everything if "@" in name}
    parts: list[str] = []
    for word in text.split("@"):
        if parts and parts[-1] in users and parts[-1] not in everything:
            parts[-1] += f"@{word}"
        else:
            parts.append(word)
    return parts


def _filtered(part: str, option: str, everything: Mapping[str, Sequence[int]]) -> list[tuple[str, set[int]]]:
    """Hosts and slots of one part of a filter. Raises ConfigError."""
    match = re.fullmatch(r"(.+):(\d+(?:,\d+)*)", part) if part not in everything else None
    try:
        names = expand(match[1] if match else part)
    except ValueError as error:
        raise ConfigError(f"{option}: {part!r} is not of the form host or host:0,1: {error}") from None
    if unknown := [name for name in names if name not in everything]:
        raise ConfigError(f"{option}: host {unknown[0]!r} is not in the hostfile; it has {', '.join(everything)}")
    slots = {int(number) for number in match[2].split(",")} if match else None
    return [(name, set(everything[name]) if slots is None else slots) for name in names]


def world_size(selection: Mapping[str, Sequence[int]]) -> int:
    """Ranks on these slots: one each."""
    return sum(map(len, selection.values()))


def runs_locally(selection: Mapping[str, Sequence[int]]) -> bool:
    """Whether the run is one host, and that host is this one."""
    return len(selection) == 1 and next(iter(selection)) in ("localhost", "127.0.0.1", socket.gethostname())

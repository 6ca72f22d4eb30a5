"""The result of a preflight as data, as a table and as JSON: faults first, each with host, cause and remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from jp_train.errors import LaunchError
from jp_train.terminal import aligned, printable

GIB = 1 << 30
NAMED = 4
"""Hosts named in one line of the table; JSON has them all."""
ELAPSED = re.compile(r" after \d+\.\d s")
"""How long a host took to answer or to fail, in `Answer.summary`."""
ADDRESS = re.compile(
    r"(?<![\w.:])"
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[?(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w+)?\]?)"
    r"(?::\d+| port \d+)?"
)
"""An IPv4 or IPv6 address, with a port where one follows."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: on which host, by which check, what it is, what to do. A `warning` does not stop a
    launch."""

    host: str
    check: str
    message: str
    remedy: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """Faults first, then warnings, then the hosts as they are."""

    faults: list[Fault]
    warnings: list[Fault]
    hosts: dict[str, dict[str, Any]]
    """A few facts of each host that answered, for the table."""
    notes: list[str]
    """What was measured, and what was not examined and why."""
    seconds: float
    selected: list[str] = field(default_factory=list)
    """All hosts that were examined."""

    @property
    def ok(self) -> bool:
        """No fault. Warnings do not count."""
        return not self.faults

    @property
    def exit_code(self) -> int:
        """0, or that of LaunchError."""
        return 0 if self.ok else LaunchError.exit_code

    def as_json(self) -> dict[str, Any]:
        """Everything, as one JSON-able object."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 2),
            "faults": [_plain(fault) for fault in self.faults],
            "warnings": [_plain(fault) for fault in self.warnings],
            "notes": self.notes,
            "hosts": self.hosts,
        }

    def table(self) -> str:
        """The same for people."""
        lines = []
        for word, faults in (("FAULT", self.faults), ("warning", self.warnings)):
            for hosts, fault in _alike(faults):
                lines += [
                    f"{word}  {hosts}  {fault.check}: {printable(fault.message)}",
                    f"{' ' * len(word)}  -> {printable(fault.remedy)}",
                ]
        if lines:
            lines.append("")
        if self.hosts:
            columns = list(dict.fromkeys(name for facts in self.hosts.values() for name in facts))
            rows = [["host", *columns]] + [
                [host, *(printable(str(facts.get(name, "-"))) for name in columns)]
                for host, facts in self.hosts.items()
            ]
            lines += [*aligned(rows, left=(0,)), ""]
        lines += [printable(note) for note in self.notes]
        counts = f"{_counted(len(self.faults), 'fault')}, {_counted(len(self.warnings), 'warning')}"
        lines.append(f"{counts}: {_counted(len(self.selected), 'host')} in {self.seconds:.1f} s")
        return "\n".join(lines)


def gib(size: float) -> str:
    """`3.21 GiB`, or MiB for small sizes."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 4 else f"{size / (1 << 20):,.1f} MiB"


def rate_text(rate: float) -> str:
    """Bytes/s as MB/s or GB/s, and the Gbit/s that links are sold by."""
    return f"{rate / 1e9:,.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:,.1f} MB/s"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plain(fault: Fault) -> dict[str, str]:
    return {"host": fault.host, "check": fault.check, "found": fault.message, "remedy": fault.remedy}


def _alike(faults: list[Fault]) -> list[tuple[str, Fault]]:
    """Faults of several hosts that differ in the host, its addresses and the time taken only, as one line each:
    (hosts, the first's)."""
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        texts = [ELAPSED.sub("", text.replace(fault.host, "\0")) for text in (fault.message, fault.remedy)]
        if fault.check != "versions":  # there 1.2.3.4 is none
            texts = [ADDRESS.sub("(address)", text) for text in texts]
        groups.setdefault((fault.check, *texts), []).append(fault)
    return [(_hosts_text([fault.host for fault in group]), group[0]) for group in groups.values()]


def _hosts_text(hosts: list[str]) -> str:
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    example = f" ({len(hosts)} hosts; what follows is of {hosts[0]})" if len(hosts) > 1 else ""
    return f"{', '.join(hosts[:NAMED])}{more}{example}"

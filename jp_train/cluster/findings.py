"""What preflight found, as data, as a table and as JSON: faults first, each with host, cause and remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from jp_train.errors import LaunchError
from jp_train.terminal import aligned, printable

GIB = 1 << 30
NAMED = 4
"""Hosts named in one line of the table; JSON has them all."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: on which host, found by which check, what it is, what to do. A `warning` does not
    stop a launch."""

    host: str
    check: str
    found: str
    remedy: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found: faults first, then warnings, then the hosts as they are."""

    faults: list[Fault]
    warnings: list[Fault]
    hosts: dict[str, dict[str, Any]]
    """A few facts of each host that answered, for the table."""
    notes: list[str]
    """What was measured, and what was not looked at and why."""
    seconds: float
    asked: list[str] = field(default_factory=list)

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
        told = {"ok": self.ok, "seconds": round(self.seconds, 2)}
        told |= {
            "faults": [_plain(fault) for fault in self.faults],
            "warnings": [_plain(fault) for fault in self.warnings],
        }
        return told | {"notes": self.notes, "hosts": self.hosts}

    def table(self) -> str:
        """The same for people."""
        lines = []
        for word, found in (("FAULT", self.faults), ("warning", self.warnings)):
            for hosts, fault in _alike(found):
                lines += [
                    f"{word}  {hosts}  {fault.check}: {printable(fault.found)}",
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
        count = f"{len(self.faults)} fault{'' if len(self.faults) == 1 else 's'}, {len(self.warnings)} warning{'' if len(self.warnings) == 1 else 's'}"
        lines.append(f"{count}: {len(self.asked)} host{'' if len(self.asked) == 1 else 's'} in {self.seconds:.1f} s")
        return "\n".join(lines)


def gib(size: float) -> str:
    """`3.21 GiB`, or MiB for small sizes."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 4 else f"{size / (1 << 20):,.1f} MiB"


def rate_text(rate: float) -> str:
    """Bytes/s as MB/s or GB/s, and the Gbit/s that links are sold by."""
    return f"{rate / 1e9:,.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:,.1f} MB/s"


def _plain(fault: Fault) -> dict[str, str]:
    return {name: value for name, value in asdict(fault).items() if name != "warning"}


def _alike(faults: list[Fault]) -> list[tuple[str, Fault]]:
    """Faults that say the same of several hosts as one line each: (hosts, the first's)."""
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault(
            (fault.check, fault.found.replace(fault.host, "\0"), fault.remedy.replace(fault.host, "\0")), []
        ).append(fault)
    return [(_hosts_text([fault.host for fault in group]), group[0]) for group in groups.values()]


def _hosts_text(hosts: list[str]) -> str:
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    return f"{', '.join(hosts[:NAMED])}{more}{f' ({len(hosts)} hosts; what follows is of {hosts[0]})' if len(hosts) > 1 else ''}"

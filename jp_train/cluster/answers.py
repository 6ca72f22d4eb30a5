"""What a preflight knows: the launching host's side, and what the hosts have answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jp_train.cluster.hostfile import Selection

Facts = Mapping[str, Mapping[str, Any]]
"""{host: {name of the fact: value}}, see `facts.FACTS`."""


@dataclass(kw_only=True)
class Answers:
    """What a check may look at: what the launching host knows, and what the hosts have answered so far, by host."""

    selection: Selection
    """Slots of each host that the run uses."""
    slots: Mapping[str, int]
    """Slots of each host in the hostfile."""
    local: bool
    """The run is on this host alone."""
    port: int
    """Master port."""
    code: Mapping[str, str] = field(default_factory=dict)
    """{file: digest} of the launching host, as `jobs` and `config` are."""
    jobs: Sequence[Mapping[str, Any]] = ()
    config: str | None = None
    """The resolved YAML; None without a configuration."""
    run_dir: str = ""
    """Absolute; empty without a configuration."""
    checkpoint_bytes: int = 0
    """Lower bound of one checkpoint; 0: unknown."""

    facts: Facts = field(default_factory=dict)
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(seconds ahead of the launching host, uncertainty)."""
    shared_writer: str = ""
    """The host that wrote a file into `shared_folder` for the others to see."""
    shared_folder: str = ""
    shared_error: str = ""
    """Why it could not."""
    shared_missing: list[str] = field(default_factory=list)
    """Hosts that do not see that file."""
    listening: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Ports that each host has opened."""
    alone: bool = False
    """No other host answers."""
    rendezvous_host: str = ""
    """The first host that answers: rank 0's."""
    address: str = ""
    """Of the rendezvous, for the other hosts."""
    unreached_port: dict[str, str] = field(default_factory=dict)
    """Why a host did not reach the master port."""
    unreached: dict[str, dict[str, str]] = field(default_factory=dict)
    """{host: {other: why it was not reached}}."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    torch: dict[str, dict[str, Any]] = field(default_factory=dict)
    torch_errors: dict[str, str] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """{"sends", "receives"} in bytes/s."""
    backend: str = ""
    """Which measured the rates, nccl or gloo."""
    all_reduce_errors: dict[str, str] = field(default_factory=dict)

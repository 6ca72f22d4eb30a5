"""The table of preflight's checks. `jp-train preflight --help` and the preflight itself walk it.

A new check is a function in `host_checks.py` or `network_checks.py` and its entry here; a new fact that it needs is one
entry of `facts.FACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from jp_train.cluster import host_checks as hosts
from jp_train.cluster import network_checks as network
from jp_train.cluster.findings import Fault
from jp_train.cluster.hostfile import Selection


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
    checkpoint_bytes: int = 0
    """Lower bound of one checkpoint; 0: unknown."""

    facts: hosts.Facts = field(default_factory=dict)
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


@dataclass(frozen=True)
class Check:
    """`name` as --skip takes it; `question` as --help prints it, what holds when there is no fault; `after`: {phase of
    the preflight: the faults that its answers show}. Phases: facts, clocks, shared, reach, data, torch, bandwidth."""

    name: str
    question: str
    after: Mapping[str, Callable[[Answers], Iterable[Fault]]]


CHECKS = (
    Check(
        "versions",
        "python, torch, deepspeed, transformers, numpy, NCCL and driver are the same everywhere",
        {
            "facts": lambda answers: hosts.check_versions(answers.facts),
            "torch": lambda answers: chain(
                hosts.check_torch_loads(answers.torch_errors),
                hosts.check_torch(answers.torch, answers.facts, answers.selection),
            ),
        },
    ),
    Check(
        "code",
        "every host imports the same jp_train",
        {"facts": lambda answers: hosts.check_code(answers.facts, answers.code)},
    ),
    Check(
        "config",
        "every host reads the same configuration",
        {"facts": lambda answers: hosts.check_config(answers.facts, answers.config)},
    ),
    Check(
        "devices",
        "the hostfile's slots fit the GPUs, and nobody uses these; no GPU anywhere, or everywhere; no machine under "
        "two names",
        {
            "facts": lambda answers: chain(
                hosts.check_devices(answers.facts, answers.selection, answers.slots),
                hosts.check_machines(answers.facts),
                hosts.check_busy(answers.facts, answers.selection, local=answers.local),
            )
        },
    ),
    Check("clock", "the hosts' clocks agree", {"clocks": lambda answers: hosts.check_clocks(answers.clocks)}),
    Check(
        "disk",
        "run folder, caches, temporary and shared memory can be written and have room",
        {"facts": lambda answers: hosts.check_disks(answers.facts, answers.checkpoint_bytes)},
    ),
    Check(
        "shared",
        "the run folder is one and the same on all hosts",
        {
            "shared": lambda answers: hosts.check_shared(
                answers.shared_writer, answers.shared_folder, answers.shared_missing, answers.shared_error
            )
        },
    ),
    Check(
        "data",
        "shards, index, tokenizer and weights are the same everywhere; a sample of each source is read",
        {"data": lambda answers: hosts.check_data(answers.data)},
    ),
    Check(
        "jobs",
        "no process of an earlier launch is left",
        {"facts": lambda answers: hosts.check_jobs(answers.facts, answers.jobs, local=answers.local)},
    ),
    Check(
        "locks",
        "no lock file of an extension build is left",
        {"facts": lambda answers: hosts.check_locks(answers.facts)},
    ),
    Check(
        "port",
        "the master port is free on the first host, and all others reach it",
        {
            "reach": lambda answers: network.check_port(
                answers.rendezvous_host,
                answers.address,
                answers.port,
                answers.listening[answers.rendezvous_host]["master"],
                answers.unreached_port,
            )
        },
    ),
    Check(
        "reach",
        "every host reaches every other one at the address that the ranks will use",
        {"reach": lambda answers: network.check_reach(answers.listening, answers.unreached, alone=answers.alone)},
    ),
    Check(
        "bandwidth",
        "an all-reduce over all hosts works, and none is much slower than the others",
        {
            "bandwidth": lambda answers: chain(
                network.check_all_reduce(
                    answers.all_reduce_errors, answers.rendezvous_host, answers.address, answers.port
                ),
                network.check_bandwidth(answers.rates, answers.backend),
            )
        },
    ),
)
"""In the order of --help. Whether a host answers over ssh at all cannot be skipped and has no entry."""
CHECK_NAMES = tuple(check.name for check in CHECKS)

"""The table of preflight's checks. `jp-train preflight --help` and the preflight itself walk it.

A new check is a function in `host_checks.py` or `network_checks.py` and its entry here; a new fact that it needs is one
entry of `facts.FACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jp_train.cluster import host_checks as hosts
from jp_train.cluster import network_checks as network
from jp_train.cluster.answers import Answers
from jp_train.cluster.findings import Fault


@dataclass(frozen=True)
class Check:
    """`name` as --skip takes it; `question` as --help prints it, what holds when there is no fault; `after`: {phase of
    the preflight: functions that find the faults in its answers}. Phases: facts, clocks, shared, reach, data, torch,
    bandwidth."""

    name: str
    question: str
    after: Mapping[str, Sequence[Callable[[Answers], Iterator[Fault]]]]


CHECKS = (
    Check(
        "versions",
        "python, torch, deepspeed, transformers, numpy, NCCL and driver are the same everywhere",
        {"facts": [hosts.check_versions], "torch": [hosts.check_torch_loads, hosts.check_torch, hosts.check_gpus_work]},
    ),
    Check("code", "every host imports the same jp_train", {"facts": [hosts.check_code]}),
    Check("config", "every host reads the same configuration", {"facts": [hosts.check_config]}),
    Check(
        "devices",
        "the hostfile's slots fit the GPUs, and nobody uses these; no GPU anywhere, or everywhere; no "
        "machine under two names",
        {"facts": [hosts.check_devices, hosts.check_machines, hosts.check_busy]},
    ),
    Check("clock", "the hosts' clocks agree", {"clocks": [hosts.check_clocks]}),
    Check(
        "disk",
        "run folder, caches, temporary and shared memory can be written and have room",
        {"facts": [hosts.check_disks]},
    ),
    Check("shared", "the run folder is one and the same on all hosts", {"shared": [hosts.check_shared]}),
    Check(
        "data",
        "shards, index, tokenizer and weights are the same everywhere; a sample of each source is read",
        {"data": [hosts.check_data]},
    ),
    Check("jobs", "no process of an earlier launch is left", {"facts": [hosts.check_jobs]}),
    Check("locks", "no lock file of an extension build is left", {"facts": [hosts.check_locks]}),
    Check(
        "port", "the master port is free on the first host, and all others reach it", {"reach": [network.check_port]}
    ),
    Check(
        "reach",
        "every host reaches every other one at the address that the ranks will use",
        {"reach": [network.check_reach]},
    ),
    Check(
        "bandwidth",
        "an all-reduce over all hosts works, and none is much slower than the others",
        {"bandwidth": [network.check_all_reduce, network.check_bandwidth]},
    ),
)
"""In the order of --help. Whether a host answers over ssh at all cannot be skipped and has no entry."""
CHECK_NAMES = tuple(check.name for check in CHECKS)

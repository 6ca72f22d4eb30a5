"""Facts of all hosts -> what is wrong, on which host, and what to do about it. Pure functions: no host is asked
anything here.

Where hosts must agree, the odd ones are named: what most hosts have is taken for right, and at a tie what the launching
host has.
"""

from __future__ import annotations

import errno
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from jp_train.cluster.facts import GPU_FREE_MIB
from jp_train.cluster.findings import GIB, Fault, gib
from jp_train.cluster.remote import Answer, Cause, last_line

CHECKS = {
    "versions": "python, torch, deepspeed, transformers, numpy, NCCL and driver are the same everywhere",
    "code": "every host imports the same jp_train",
    "config": "every host reads the same configuration",
    "devices": "the hostfile's slots fit the GPUs, and nobody uses these; no GPU anywhere, or everywhere; no machine under two names",
    "clock": "the hosts' clocks agree",
    "disk": "run folder, caches, temporary and shared memory can be written and have room",
    "shared": "the run folder is one and the same on all hosts",
    "data": "shards, index, tokenizer and weights are the same everywhere; a sample of each source is read",
    "jobs": "no process of an earlier launch is left",
    "locks": "no lock file of an extension build is left",
    "port": "the master port is free on the first host, and all others reach it",
    "reach": "every host reaches every other one at the address that the ranks will use",
    "bandwidth": "an all-reduce over all hosts works, and none is much slower than the others",
}
"""What can be skipped by name, in the order of the report. Whether a host answers over ssh at all cannot."""

CLOCK_FAULT_S = 5.0
CLOCK_WARNING_S = 1.0
LOCK_STALE_S = 300.0
"""No extension of DeepSpeed takes longer to build (100 s on a busy machine were measured)."""
HARMLESS: dict[str, Any] = {
    "host_name": "", "python": "unknown", "packages": {}, "driver": "", "devices": 0, "gpu_memory": [], "cores": 1 << 20, "addresses": [], "disks": {}, "locks": [], "jobs": [],
}  # fmt: skip
LITTLE = {"temporary files": GIB // 4, "shared memory": 64 << 20}
"""Free bytes below which a folder is worth a warning; the caches 1 GiB. 64 MiB is what a container gets as shared
memory if nobody asks for more."""
PREFLIGHT = "preflight-"
"""What the ids of preflights begin with: their probes are nobody's left-overs, and end by themselves."""
NEEDED = ("run folder", "temporary files", "shared memory")
"""What a run cannot do without; an unwritable cache only costs time."""
NAMED = 3


def check_answers(lost: Mapping[str, Answer], python: str, cwd: str) -> Iterator[Fault]:
    """Hosts that could not be asked, or stopped answering."""
    for host, answer in lost.items():
        said = answer.stderr
        if answer.cause is Cause.TIMEOUT:
            yield Fault(host, "answer", answer.summary, answer.remedy)
        elif answer.cause is not None:
            yield Fault(host, "ssh", answer.summary, answer.remedy)
        elif "No module named" in said:
            remedy = f"the same jp_train and virtual environment must be on {host} at the same path: copy them, or mount the folder that has them"
            yield Fault(host, "code", f"{python} in {cwd}: {last_line(said)}", remedy)
        elif answer.returncode in (126, 127) or "cd:" in said:
            remedy = f"{host} needs {python} and {cwd} at the same path: copy them, or mount the folder that has them"
            yield Fault(host, "code", last_line(said) or answer.summary, remedy)
        else:
            remedy = f"run it by hand: ssh {host} 'cd {cwd} && {python} -m jp_train.cluster.probe </dev/null'"
            yield Fault(host, "answer", f"the probe ended: {answer.summary}", remedy)


def settled(facts: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[Fault]]:
    """The facts with a harmless value where one could not be had, and a warning for each of those.

    Code and configuration stay errors, for their checks. A fact that a host does not tell at all belongs to another
    version of the code.
    """
    found, faults = {}, []
    for host, fact in facts.items():
        untold = {"error": f"{host} does not tell it: another version of jp_train"}
        found[host] = {name: fact.get(name, untold) for name in (*HARMLESS, "code", "config")}
        for name, harmless in HARMLESS.items():
            if isinstance(found[host][name], Mapping) and "error" in found[host][name]:
                remedy = f"see why on {host}; what depends on it was not looked at there"
                faults.append(
                    Fault(
                        host,
                        "answer",
                        f"{name} could not be found out: {found[host][name]['error']}",
                        remedy,
                        warning=True,
                    )
                )
                found[host][name] = harmless
    return found, faults


def check_versions(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """`python`, `driver` and `packages` of each host."""
    found: dict[str, dict[str, str]] = {}
    for host, fact in facts.items():
        versions = {"python": fact["python"], "driver": fact["driver"], **fact["packages"]}
        for name, version in versions.items():
            found.setdefault(name, {})[host] = str(version)
    for name, versions in found.items():
        versions = {host: versions.get(host, "not installed") for host in facts}
        usual, odd = odd_ones(versions)
        how = (
            f"pip install {name}=={usual}"
            if name not in ("python", "driver", "nccl")
            else f"install the {name} that the others have"
        )
        for host in odd:
            others = f"{usual or 'none'} on {len(facts) - len(odd)} of {len(facts)} hosts"
            yield Fault(
                host,
                "versions",
                f"{name} {versions[host] or 'none'}, but {others}",
                f"on {host}: {how} (or the other way round)",
                warning=name == "driver" and bool(versions[host] and usual),
            )  # the ranks meet all the same
        if usual == "not installed" and name in ("torch", "deepspeed"):
            for host in facts.keys() - set(odd):
                yield Fault(
                    host,
                    "versions",
                    f"{name} is not installed",
                    f"on {host}: install jp_train's requirements (setup.cfg)",
                )


def check_torch(
    torch: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    selection: Mapping[str, Sequence[int]],
) -> Iterator[Fault]:
    """torch as it imports on each host: `version`, `cuda`, `nccl`, and the `devices` that it can use, against the
    selected slots."""
    for name in ("version", "cuda", "nccl"):
        values = {host: str(told.get(name, "")) for host, told in torch.items()}
        usual, odd = odd_ones(values)
        for host in odd:
            what = "torch" if name == "version" else f"{name} of torch"
            # else its metadata has told it
            if name != "version" or values[host] != facts[host]["packages"].get("torch"):
                yield Fault(
                    host,
                    "versions",
                    f"{what} runs as {values[host] or 'none'}, on the other hosts as {usual or 'none'}",
                    f"install the same torch on {host}",
                )
    for host, told in torch.items():
        there = int(facts[host]["devices"])
        if told["devices"] < there:
            yield Fault(
                host, "devices", f"torch {told['version']} (CUDA {told['cuda'] or 'none'}) can use {told['devices']} of {there} GPUs; driver {facts[host]['driver'] or 'unknown'}",
                f"on {host}: a torch build that fits the driver, a healthy driver (`nvidia-smi`), and no CUDA_VISIBLE_DEVICES in the shell's start-up files",
                warning=told["devices"] > max(selection[host]),
            )  # fmt: skip


def check_code(facts: Mapping[str, Mapping[str, Any]], here: Mapping[str, str]) -> Iterator[Fault]:
    """`code` of each host, {file: digest}, against each other and the launching host's."""
    known = {host: fact["code"] for host, fact in facts.items() if "error" not in fact["code"]}
    for host, fact in facts.items():
        if host not in known:
            yield Fault(host, "code", fact["code"]["error"], f"make the package readable on {host}")
    usual, odd = odd_ones(
        {host: tuple(sorted(code.items())) for host, code in known.items()}, tuple(sorted(here.items()))
    )
    right = dict(usual or ())
    for host in odd:
        files = sorted(name for name in known[host].keys() | right.keys() if known[host].get(name) != right.get(name))
        yield Fault(
            host, "code", f"another jp_train: {_some(files, 'file')} differ from the other hosts'",
            f"bring {host} to the same commit as the others (`git status` there), or mount one folder on all",
        )  # fmt: skip
    if known and not odd and usual != tuple(sorted(here.items())):
        files = sorted(name for name in here.keys() | right.keys() if here.get(name) != right.get(name))
        yield Fault(
            "(this host)", "code", f"all hosts have another jp_train than the launching host: {_some(files, 'file')} differ",
            "launch from a checkout of the same commit",
        )  # fmt: skip


def check_config(facts: Mapping[str, Mapping[str, Any]], here: str | None) -> Iterator[Fault]:
    """`config` of each host, the resolved YAML, against the launching host's."""
    for host, fact in facts.items():
        config = fact["config"]
        if here is None or config == here:
            continue
        if isinstance(config, dict):
            yield Fault(
                host, "config", config["error"], f"put the configuration, and what it names, at the same path on {host}"
            )
            continue
        changed = sorted(set(str(config).splitlines()) - set(here.splitlines()))
        named = "; ".join(line.strip() for line in changed[:NAMED]) or "keys are missing"
        remedy = f"copy the launch YAML and its recipe to {host}, or mount one folder on all"
        yield Fault(host, "config", f"resolves to another configuration: {named}", remedy)


def check_devices(
    facts: Mapping[str, Mapping[str, Any]], selection: Mapping[str, Sequence[int]], slots: Mapping[str, int]
) -> Iterator[Fault]:
    """`devices` and `cores` of each host against its `slots` in the hostfile and those of them that are selected."""
    counts = {host: int(fact["devices"]) for host, fact in facts.items()}
    with_gpus = [host for host, count in counts.items() if count]
    for host, count in counts.items():
        if count:
            if max(selection[host]) >= count:
                yield Fault(
                    host, "devices", f"{slots[host]} slots in the hostfile, but {count} GPU device files in /dev",
                    f"write `{host} slots={count}`, or find the missing GPU (`nvidia-smi -L`, `dmesg | grep -i nvrm`)",
                )  # fmt: skip
            elif slots[host] < count:
                yield Fault(
                    host,
                    "devices",
                    f"{slots[host]} slots for {count} GPUs",
                    f"write `{host} slots={count}` to use all",
                    warning=True,
                )
        elif with_gpus:
            yield Fault(
                host, "devices", f"no GPU device file in /dev, while {_some(with_gpus, 'host')} {'has' if len(with_gpus) == 1 else 'have'} GPUs",
                f"load the driver on {host} (`modprobe nvidia`), give its container the devices, or leave it out with --exclude {host}",
            )  # fmt: skip
        elif len(selection[host]) > int(facts[host]["cores"]):
            yield Fault(
                host, "devices", f"no GPU, so slots are CPU processes: {len(selection[host])} of them on {facts[host]['cores']} cores",
                "give a CPU host no more slots than cores: ranks that share a core make every step many times slower", warning=True,
            )  # fmt: skip


def check_busy(
    facts: Mapping[str, Mapping[str, Any]], selection: Mapping[str, Sequence[int]], *, local: bool
) -> Iterator[Fault]:
    """`gpu_memory` of the selected slots: somebody else's job, of whatever program. A run on this host alone
    (`local`) may share it."""
    for host, fact in facts.items():
        busy = [(gpu, used) for gpu, used, _ in fact["gpu_memory"] if gpu in selection[host] and used > GPU_FREE_MIB]
        if busy:
            yield Fault(
                host, "devices", f"{_some([f'{gpu} ({gib(used << 20)})' for gpu, used in busy], 'GPU')} in use before the run has started",
                f"see who uses them (ssh {host} nvidia-smi; fuser -v /dev/nvidia*) and end it, or leave them out with --exclude {host}:{','.join(str(gpu) for gpu, _ in busy)}",
                warning=local,
            )  # fmt: skip


def check_machines(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """`host_name` and `addresses` of each host: two lines of a hostfile that are one machine would give its GPUs to
    two ranks each."""
    known: dict[tuple[str, ...], str] = {}
    for host, fact in facts.items():
        if fact["host_name"] and fact["addresses"]:
            same = known.setdefault((fact["host_name"], *sorted(fact["addresses"])), host)
            if same != host:
                yield Fault(
                    host, "devices", f"is the same machine as {same}: both are {fact['host_name']} with the addresses {_some(fact['addresses'])}",
                    "write every machine once in the hostfile, with all its slots",
                )  # fmt: skip


def check_clocks(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Fault]:
    """(seconds ahead of the launching host, uncertainty) of each host, against the median of all and the launching
    host."""
    middle = statistics.median([0.0, *(offset for offset, _ in offsets.values())]) if offsets else 0.0
    for host, (offset, uncertainty) in offsets.items():
        away = offset - middle
        if abs(away) - uncertainty > CLOCK_WARNING_S:
            way = "ahead of" if away > 0 else "behind"
            yield Fault(
                host, "clock", f"the clock is {abs(away):,.1f} s {way} the others'",
                f"start time synchronisation on {host} (`timedatectl set-ntp true`; `chronyc makestep` sets it at once)",
                warning=abs(away) - uncertainty <= CLOCK_FAULT_S,
            )  # fmt: skip


def check_disks(facts: Mapping[str, Mapping[str, Any]], checkpoint_bytes: int) -> Iterator[Fault]:
    """`disks` of each host; the run folder must hold `checkpoint_bytes` (0: unknown)."""
    for host, fact in facts.items():
        by_device: dict[Any, list[str]] = {}
        for name, found in fact["disks"].items():
            if "error" in found:
                by_device.setdefault((found.get("device"), found["error"], found.get("errno")), []).append(name)
                continue
            least = checkpoint_bytes if name == "run folder" else LITTLE.get(name, GIB)
            if found["free"] < least:
                what = "one checkpoint takes at least" if name == "run folder" else "it should have"
                yield Fault(
                    host, "disk", f"{name} {found['path']}: {gib(found['free'])} free, {what} {gib(least)}",
                    _room(host, name, found), warning=name != "run folder",
                )  # fmt: skip
        for (_, reason, number), names in by_device.items():
            places = ", ".join(f"{name} ({fact['disks'][name]['there']})" for name in names)
            first = fact["disks"][names[0]]
            remedy = (
                _room(host, names[0], first)
                if number in (errno.ENOSPC, errno.EDQUOT)
                else f"make {first['there']} writable on {host}"
            )
            if number == errno.EROFS:
                remedy += f" (`mount -o remount,rw`; a disk with errors is remounted read-only: `dmesg` on {host})"
            yield Fault(
                host, "disk", f"{reason}: {places} cannot be written", remedy, warning=not set(names) & set(NEEDED)
            )


def check_shared(first: str, folder: str, missing: Sequence[str], error: str) -> Iterator[Fault]:
    """Hosts that do not see the file that `first` wrote into the run folder; `error` when it could not write one."""
    if error:
        yield Fault(
            first, "shared", f"run folder {folder}: {error}", f"make it writable on {first}, or choose another run_dir"
        )
    for host in missing:
        yield Fault(
            host, "shared", f"a file that {first} wrote into {folder} is not there on {host}",
            f"mount the same folder on {host} as on {first} (`df {folder}` on both): every rank writes its part of a checkpoint there",
        )  # fmt: skip


def check_data(data: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """`sources` and `files` of each host. What is wrong in the same way with several of them is one fault a host."""
    unread: dict[str, dict[str, str]] = {}
    other: dict[str, list[str]] = {}
    planned: dict[str, list[str]] = {}
    not_indexed = []
    for group, label in (("sources", "source {}"), ("files", "{}")):
        for name in dict.fromkeys(name for told in data.values() for name in told[group]):
            seen = {host: told[group][name] for host, told in data.items() if name in told[group]}
            for host, found in seen.items():
                if "error" in found:
                    unread.setdefault(host, {})[label.format(name)] = found["error"]
            good = {host: found for host, found in seen.items() if "error" not in found}
            _, odd = odd_ones({host: found["digest"] for host, found in good.items()})
            for host in odd:
                other.setdefault(host, []).append(label.format(name))
            indexes = {host: found["index"] for host, found in good.items() if host not in odd and "index" in found}
            if indexes and not any(indexes.values()):
                not_indexed.append(name)
            for which in {which for index in indexes.values() for which in index}:
                for host in odd_ones({host: index[which] for host, index in indexes.items() if which in index})[1]:
                    planned.setdefault(host, []).append(label.format(name))
    for host, errors in unread.items():
        first, *more = errors
        text = f"{first}: {errors[first]}{f'; also {_some(more)}' if more else ''}"
        everywhere = len(unread) == len(data)
        remedy = (
            "correct data.root and the paths in the configuration"
            if everywhere
            else f"mount or copy the data on {host}, as the others have it"
        )
        yield Fault(host, "data", text, remedy)
    for host, names in other.items():
        yield Fault(
            host,
            "data",
            f"{_some(names)}: names, sizes or contents of the files differ from the other hosts'",
            f"mount or copy the same data on {host}",
        )
    for host, names in planned.items():
        yield Fault(
            host, "data", f"{_some(names)}: the index differs from the other hosts', so the order of the data would",
            f"on {host}: delete the *.jp-* files beside the shards (or mount the same data), then `jp-train data index CONFIG`",
        )  # fmt: skip
    if not_indexed:
        yield Fault(
            "(all)", "data", f"not indexed yet: {_some(not_indexed, 'source')}; rank 0 does it at the start, while all others wait",
            "run `jp-train data index CONFIG` beforehand", warning=True,
        )  # fmt: skip


def check_jobs(
    facts: Mapping[str, Mapping[str, Any]], here: Sequence[Mapping[str, Any]], *, local: bool
) -> Iterator[Fault]:
    """`jobs` of each host: processes of launches, and whether the runner of each lives anywhere. A run on this host
    alone (`local`) may share it."""
    alive = {
        job["launch"] for jobs in (here, *(fact["jobs"] for fact in facts.values())) for job in jobs if job["runner"]
    }
    for host, fact in facts.items():
        launches: dict[str, list[Mapping[str, Any]]] = {}
        for job in fact["jobs"]:
            launches.setdefault(job["launch"], []).append(job)
        for launch, jobs in launches.items():
            pids = " ".join(str(job["pid"]) for job in jobs)
            what = f"{len(jobs)} {'process' if len(jobs) == 1 else 'processes'} of launch {launch} ({jobs[0]['command'][:60]} ...)"
            if launch.startswith(PREFLIGHT):
                yield Fault(
                    host,
                    "jobs",
                    f"{what}: another preflight examines this host",
                    "start again when it has ended",
                    warning=True,
                )
            elif launch in alive:
                yield Fault(
                    host,
                    "jobs",
                    f"{what}: another run is on this host",
                    "wait for it, or leave the host out",
                    warning=True,
                )
            else:
                yield Fault(
                    host, "jobs", f"{what}, whose launcher is gone: they hold devices, memory and ports",
                    f"ssh {host} kill -9 {pids}   (if nobody trains there)", warning=local,
                )  # fmt: skip


def check_locks(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """`locks` of each host."""
    for host, fact in facts.items():
        for lock in fact["locks"]:
            stale = lock["age_s"] > LOCK_STALE_S
            yield Fault(
                host, "locks", f"{lock['path']} is {lock['age_s'] / 60:,.0f} min old: {'its build was killed' if stale else 'something builds, or was killed'}, "
                "and whoever loads that extension waits for it for ever", f"on {host}: rm {lock['path']}", warning=not stale,
            )  # fmt: skip


def odd_ones(values: Mapping[str, Hashable], here: Hashable = None) -> tuple[Any, list[str]]:
    """What most hosts have (at a tie: `here` if it is among them, else the first host's), and the hosts that have
    something else."""
    if not values:
        return None, []
    counts = Counter(values.values())
    most = max(counts.values())
    tied = [value for value, count in counts.items() if count == most]
    usual = here if here in tied else tied[0]
    return usual, [host for host, value in values.items() if value != usual]


def _room(host: str, name: str, found: Mapping[str, Any]) -> str:
    """Where to make room."""
    if name == "shared memory":
        return f"give {host}'s container more shared memory (docker --shm-size=8g), or clear {found['path']}"
    where = (
        "delete old checkpoints or choose a run_dir on a larger disk"
        if name == "run folder"
        else "clear it, or name another folder by its variable"
    )
    return f"free space at {found['there']} on {host} (`df {found['there']}`): {where}"


def _some(names: Sequence[str], what: str = "") -> str:
    """`files a, b, c and 4 more`."""
    label = f"{what}{'s' if len(names) > 1 else ''} " if what else ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{label}{', '.join(names[:NAMED])}{more}"

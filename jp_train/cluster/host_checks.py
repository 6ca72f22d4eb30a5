"""Preflight's checks of the hosts: the facts of all hosts -> what is wrong, on which host, and what to do about it.

Pure functions: no host is queried here. Where hosts must agree, those that differ from the majority are named: what
most hosts have counts as right, and at a tie what the launching host has.
"""

from __future__ import annotations

import errno
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from jp_train.cluster.answers import Answers, Facts
from jp_train.cluster.facts import FACTS, GPU_FREE_MIB
from jp_train.cluster.findings import GIB, Fault, gib
from jp_train.cluster.remote import Answer, Cause, last_line

CLOCK_FAULT_S = 5.0
CLOCK_WARNING_S = 1.0
LOCK_STALE_S = 300.0
"""No extension of DeepSpeed takes longer to build (100 s on a busy machine were measured)."""
LITTLE = {"temporary files": GIB // 4, "shared memory": 64 << 20}
"""Free bytes below which a folder is worth a warning; the caches 1 GiB. 64 MiB is what a container gets as shared
memory by default."""
PREFLIGHT = "preflight-"
"""What the ids of preflights begin with: their probes are not left over from a launch, and end by themselves."""
NEEDED = ("run folder", "temporary files", "shared memory")
"""What a run cannot do without; an unwritable cache only costs time."""
NAMED = 3


def check_answers(lost: Mapping[str, Answer], python: str, cwd: str) -> Iterator[Fault]:
    """Hosts that could not be queried, or stopped answering."""
    for host, answer in lost.items():
        stderr = answer.stderr
        if answer.cause is Cause.TIMEOUT:
            yield Fault(host, "answer", answer.summary, answer.remedy)
        elif answer.cause is not None:
            yield Fault(host, "ssh", answer.summary, answer.remedy)
        elif "No module named" in stderr:
            yield Fault(
                host, "code", f"{python} in {cwd}: {last_line(stderr)}",
                f"the same jp_train and virtual environment must be on {host} at the same path: copy them, or mount "
                "the folder that has them",
            )  # fmt: skip
        elif answer.returncode in (126, 127) or "cd:" in stderr:
            remedy = f"{host} needs {python} and {cwd} at the same path: copy them, or mount the folder that has them"
            yield Fault(host, "code", last_line(stderr) or answer.summary, remedy)
        else:
            remedy = f"run it by hand: ssh {host} 'cd {cwd} && {python} -m jp_train.cluster.probe </dev/null'"
            yield Fault(host, "answer", f"the probe ended: {answer.summary}", remedy)


def settled(facts: Facts) -> tuple[dict[str, dict[str, Any]], list[Fault]]:
    """The facts with a harmless value in place of those that are unknown, and a warning for each of these.

    Code and configuration have no harmless value: their checks report the error. A fact that a host does not send at
    all belongs to another version of the code.
    """
    complete: dict[str, dict[str, Any]] = {}
    faults = []
    for host, sent in facts.items():
        missing = {"error": f"{host} does not tell it: another version of jp_train"}
        complete[host] = {name: sent.get(name, missing) for name in FACTS}
        for name, value in complete[host].items():
            harmless = FACTS[name].harmless
            if harmless is not None and isinstance(value, Mapping) and "error" in value:
                message = f"{name} could not be found out: {value['error']}"
                remedy = f"see why on {host}; what depends on it was not looked at there"
                faults.append(Fault(host, "answer", message, remedy, warning=True))
                complete[host][name] = harmless
    return complete, faults


def check_versions(answers: Answers) -> Iterator[Fault]:
    """`python`, `driver` and `packages` of each host."""
    facts, by_name = answers.facts, dict[str, dict[str, str]]()
    for host, fact in facts.items():
        versions = {"python": fact["python"], "driver": fact["driver"], **fact["packages"]}
        for name, version in versions.items():
            by_name.setdefault(name, {})[host] = str(version)
    for name, some in by_name.items():
        versions = {host: some.get(host, "not installed") for host in facts}
        common, odd = odd_ones(versions)
        installed_by_pip = name not in ("python", "driver", "nccl")
        how = f"pip install {name}=={common}" if installed_by_pip else f"install the {name} that the others have"
        for host in odd:
            others = f"{common or 'none'} on {len(facts) - len(odd)} of {len(facts)} hosts"
            yield Fault(
                host, "versions", f"{name} {versions[host] or 'none'}, but {others}",
                f"on {host}: {how} (or the other way round)",
                # ranks on different drivers meet all the same
                warning=name == "driver" and bool(versions[host] and common),
            )  # fmt: skip
        if common == "not installed" and name in ("torch", "deepspeed"):
            for host in facts.keys() - set(odd):
                remedy = f"on {host}: install jp_train's requirements (setup.cfg)"
                yield Fault(host, "versions", f"{name} is not installed", remedy)


def check_torch_loads(answers: Answers) -> Iterator[Fault]:
    """Hosts where importing torch failed, and how."""
    for host, error in answers.torch_errors.items():
        remedy = f"on {host}: install the torch that the others have"
        yield Fault(host, "versions", f"torch cannot be loaded: {error}", remedy)


def check_torch(answers: Answers) -> Iterator[Fault]:
    """torch as it imports on each host: `version`, `cuda`, `nccl`, the `devices` that it can use, against the
    selected slots, and those of them that are `broken`."""
    torch, facts = answers.torch, answers.facts
    for name in ("version", "cuda", "nccl"):
        values = {host: str(build.get(name, "")) for host, build in torch.items()}
        common, odd = odd_ones(values)
        for host in odd:
            what = "torch" if name == "version" else f"{name} of torch"
            # else `check_versions` has reported it
            if name != "version" or values[host] != facts[host]["packages"].get("torch"):
                message = f"{what} runs as {values[host] or 'none'}, on the other hosts as {common or 'none'}"
                yield Fault(host, "versions", message, f"install the same torch on {host}")
    for host, build in torch.items():
        present = int(facts[host]["devices"])
        if build["devices"] < present:
            yield Fault(
                host, "devices",
                f"torch {build['version']} (CUDA {build['cuda'] or 'none'}) can use {build['devices']} of {present} "
                f"GPUs; driver {facts[host]['driver'] or 'unknown'}",
                f"on {host}: a torch build that fits the driver, a healthy driver (`nvidia-smi`), and no "
                "CUDA_VISIBLE_DEVICES in the shell's start-up files",
                warning=build["devices"] > max(answers.selection[host]),
            )  # fmt: skip


def check_gpus_work(answers: Answers) -> Iterator[Fault]:
    """`broken` of each host's torch: GPUs on which no tensor can be made."""
    for host, build in answers.torch.items():
        by_error: dict[str, list[str]] = {}
        for device, error in build.get("broken", {}).items():
            if int(device) in answers.selection[host]:
                by_error.setdefault(error, []).append(device)
        for error, devices in by_error.items():
            yield Fault(
                host, "devices",
                f"torch {build['version']} (CUDA {build['cuda'] or 'none'}) cannot use {_some(devices, 'GPU')}: "
                f"{error}; driver {answers.facts[host]['driver'] or 'unknown'}",
                f"on {host}: a driver new enough for this torch (`nvidia-smi` names the newest CUDA it serves), or "
                f"leave them out with --exclude {host}:{','.join(devices)}",
            )  # fmt: skip


def check_code(answers: Answers) -> Iterator[Fault]:
    """`code` of each host, {file: digest}, against each other and the launching host's."""
    facts, here = answers.facts, answers.code
    known = {host: fact["code"] for host, fact in facts.items() if "error" not in fact["code"]}
    for host, fact in facts.items():
        if host not in known:
            yield Fault(host, "code", fact["code"]["error"], f"make the package readable on {host}")
    common, odd = odd_ones(
        {host: tuple(sorted(code.items())) for host, code in known.items()}, tuple(sorted(here.items()))
    )
    right = dict(common or ())
    for host in odd:
        files = sorted(name for name in known[host].keys() | right.keys() if known[host].get(name) != right.get(name))
        yield Fault(
            host, "code", f"another jp_train: {_some(files, 'file')} differ from the other hosts'",
            f"bring {host} to the same commit as the others (`git status` there), or mount one folder on all",
        )  # fmt: skip
    if known and not odd and common != tuple(sorted(here.items())):
        files = sorted(name for name in here.keys() | right.keys() if here.get(name) != right.get(name))
        yield Fault(
            "(this host)", "code",
            f"all hosts have another jp_train than the launching host: {_some(files, 'file')} differ",
            "launch from a checkout of the same commit",
        )  # fmt: skip


def check_config(answers: Answers) -> Iterator[Fault]:
    """`config` of each host, the resolved YAML, against the launching host's (None: no configuration was given)."""
    here = answers.config
    for host, fact in answers.facts.items():
        config = fact["config"]
        if here is None or config == here:
            continue
        if isinstance(config, dict):
            remedy = f"put the configuration, and what it names, at the same path on {host}"
            yield Fault(host, "config", config["error"], remedy)
            continue
        changed = sorted(set(str(config).splitlines()) - set(here.splitlines()))
        named = "; ".join(line.strip() for line in changed[:NAMED]) or "keys are missing"
        remedy = f"copy the launch YAML and its recipe to {host}, or mount one folder on all"
        yield Fault(host, "config", f"resolves to another configuration: {named}", remedy)


def check_devices(answers: Answers) -> Iterator[Fault]:
    """`devices` and `cores` of each host against its `slots` in the hostfile and those of them that are selected."""
    facts, selection, slots = answers.facts, answers.selection, answers.slots
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
                message, remedy = f"{slots[host]} slots for {count} GPUs", f"write `{host} slots={count}` to use all"
                yield Fault(host, "devices", message, remedy, warning=True)
        elif with_gpus:
            have = "has" if len(with_gpus) == 1 else "have"
            yield Fault(
                host, "devices", f"no GPU device file in /dev, while {_some(with_gpus, 'host')} {have} GPUs",
                f"load the driver on {host} (`modprobe nvidia`), give its container the devices, or leave it out with "
                f"--exclude {host}",
            )  # fmt: skip
        elif len(selection[host]) > int(facts[host]["cores"]):
            yield Fault(
                host, "devices",
                f"no GPU, so slots are CPU processes: {len(selection[host])} of them on {facts[host]['cores']} cores",
                "give a CPU host no more slots than cores: ranks that share a core make every step many times slower",
                warning=True,
            )  # fmt: skip


def check_busy(answers: Answers) -> Iterator[Fault]:
    """`gpu_memory` of the selected slots: jobs of other users, of whatever program. A run on this host alone (`local`)
    may share a GPU."""
    for host, fact in answers.facts.items():
        selected = [(gpu, used) for gpu, used, _ in fact["gpu_memory"] if gpu in answers.selection[host]]
        busy = [(gpu, used) for gpu, used in selected if used > GPU_FREE_MIB]
        if busy:
            gpus = [f"{gpu} ({gib(used << 20)})" for gpu, used in busy]
            slots = ",".join(str(gpu) for gpu, _ in busy)
            yield Fault(
                host, "devices", f"{_some(gpus, 'GPU')} in use before the run has started",
                f"see who uses them (ssh {host} nvidia-smi; fuser -v /dev/nvidia*) and end it, or leave them out with "
                f"--exclude {host}:{slots}",
                warning=answers.local,
            )  # fmt: skip


def check_machines(answers: Answers) -> Iterator[Fault]:
    """`host_name` and `addresses` of each host: two lines of a hostfile that are one machine would give its GPUs to
    two ranks each."""
    known: dict[tuple[str, ...], str] = {}
    for host, fact in answers.facts.items():
        if fact["host_name"] and fact["addresses"]:
            same = known.setdefault((fact["host_name"], *sorted(fact["addresses"])), host)
            if same != host:
                yield Fault(
                    host, "devices",
                    f"is the same machine as {same}: both are {fact['host_name']} with the addresses "
                    f"{_some(fact['addresses'])}",
                    "write every machine once in the hostfile, with all its slots",
                )  # fmt: skip


def check_clocks(answers: Answers) -> Iterator[Fault]:
    """(seconds ahead of the launching host, uncertainty) of each host, against the median of all and the launching
    host."""
    offsets = answers.clocks
    middle = statistics.median([0.0, *(offset for offset, _ in offsets.values())]) if offsets else 0.0
    for host, (offset, uncertainty) in offsets.items():
        away = offset - middle
        if abs(away) - uncertainty > CLOCK_WARNING_S:
            way = "ahead of" if away > 0 else "behind"
            yield Fault(
                host, "clock", f"the clock is {abs(away):,.1f} s {way} the others'",
                f"start time synchronisation on {host} (`timedatectl set-ntp true`; `chronyc makestep` sets it at "
                "once)",
                warning=abs(away) - uncertainty <= CLOCK_FAULT_S,
            )  # fmt: skip


def check_disks(answers: Answers) -> Iterator[Fault]:
    """`disks` of each host; the run folder must hold `checkpoint_bytes`."""
    for host, fact in answers.facts.items():
        unwritable: dict[tuple[Any, ...], list[str]] = {}
        for name, disk in fact["disks"].items():
            if "error" in disk:
                unwritable.setdefault((disk.get("device"), disk["error"], disk.get("errno")), []).append(name)
                continue
            least = answers.checkpoint_bytes if name == "run folder" else LITTLE.get(name, GIB)
            if disk["free"] < least:
                what = "one checkpoint takes at least" if name == "run folder" else "it should have"
                yield Fault(
                    host, "disk", f"{name} {disk['path']}: {gib(disk['free'])} free, {what} {gib(least)}",
                    _room(host, name, disk), warning=name != "run folder",
                )  # fmt: skip
        for (_, reason, number), names in unwritable.items():
            folders = ", ".join(f"{name} ({fact['disks'][name]['there']})" for name in names)
            first = fact["disks"][names[0]]
            full = number in (errno.ENOSPC, errno.EDQUOT)
            remedy = _room(host, names[0], first) if full else f"make {first['there']} writable on {host}"
            if number == errno.EROFS:
                remedy += f" (`mount -o remount,rw`; a disk with errors is remounted read-only: `dmesg` on {host})"
            optional = not set(names) & set(NEEDED)
            yield Fault(host, "disk", f"{reason}: {folders} cannot be written", remedy, warning=optional)


def check_shared(answers: Answers) -> Iterator[Fault]:
    """Hosts that do not see the file that one of them wrote into the run folder, or that it could not be written."""
    writer, folder = answers.shared_writer, answers.shared_folder
    if answers.shared_error:
        remedy = f"make it writable on {writer}, or choose another run_dir"
        yield Fault(writer, "shared", f"run folder {folder}: {answers.shared_error}", remedy)
    for host in answers.shared_missing:
        yield Fault(
            host, "shared", f"a file that {writer} wrote into {folder} is not there on {host}",
            f"mount the same folder on {host} as on {writer} (`df {folder}` on both): every rank writes its part of a "
            "checkpoint there",
        )  # fmt: skip


def check_data(answers: Answers) -> Iterator[Fault]:
    """`sources` and `files` of each host. The same fault of several of them is one fault per host."""
    data = answers.data
    unread: dict[str, dict[str, str]] = {}
    other: dict[str, list[str]] = {}
    planned: dict[str, list[str]] = {}
    not_indexed = []
    for group, label in (("sources", "source {}"), ("files", "{}")):
        for name in dict.fromkeys(name for answer in data.values() for name in answer[group]):
            seen = {host: answer[group][name] for host, answer in data.items() if name in answer[group]}
            for host, fact in seen.items():
                if "error" in fact:
                    unread.setdefault(host, {})[label.format(name)] = fact["error"]
            good = {host: fact for host, fact in seen.items() if "error" not in fact}
            _, odd = odd_ones({host: fact["digest"] for host, fact in good.items()})
            for host in odd:
                other.setdefault(host, []).append(label.format(name))
            indexes = {host: fact["index"] for host, fact in good.items() if host not in odd and "index" in fact}
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
        message = f"{_some(names)}: names, sizes or contents of the files differ from the other hosts'"
        yield Fault(host, "data", message, f"mount or copy the same data on {host}")
    for host, names in planned.items():
        yield Fault(
            host, "data", f"{_some(names)}: the index differs from the other hosts', so the order of the data would",
            f"on {host}: delete the *.jp-* files beside the shards (or mount the same data), then "
            "`jp-train data index CONFIG`",
        )  # fmt: skip
    if not_indexed:
        yield Fault(
            "(all)", "data",
            f"not indexed yet: {_some(not_indexed, 'source')}; rank 0 does it at the start, while all others wait",
            "run `jp-train data index CONFIG` beforehand", warning=True,
        )  # fmt: skip


def check_jobs(answers: Answers) -> Iterator[Fault]:
    """`jobs` of each host: processes of launches, and whether the runner of each is alive on any host. A run on this
    host alone (`local`) may share it. How to end them is said of those of the run folder and of our own user's."""
    everywhere = [*answers.jobs, *(job for fact in answers.facts.values() for job in fact["jobs"])]
    alive = {job["launch"] for job in everywhere if job["runner"]}
    for host, fact in answers.facts.items():
        launches: dict[str, list[Mapping[str, Any]]] = {}
        for job in fact["jobs"]:
            launches.setdefault(job["launch"], []).append(job)
        for launch, jobs in launches.items():
            count = f"{len(jobs)} {'process' if len(jobs) == 1 else 'processes'}"
            run_dir, user = jobs[0]["run_dir"], ", ".join(sorted({job["user"] for job in jobs}))
            where = f" in {run_dir}" if run_dir else ""
            what = f"{count} of launch {launch}{where}, of user {user} ({jobs[0]['command'][:60]} ...)"
            if launch.startswith(PREFLIGHT):
                message, remedy = f"{what}: another preflight examines this host", "start again when it has ended"
                yield Fault(host, "jobs", message, remedy, warning=True)
            elif launch in alive:
                message, remedy = f"{what}: another run is on this host", "wait for it, or leave the host out"
                yield Fault(host, "jobs", message, remedy, warning=True)
            else:
                pids = " ".join(str(job["pid"]) for job in jobs)
                ours = answers.run_dir and run_dir == answers.run_dir
                if ours or all(job["own"] for job in jobs):
                    whose = "of this run folder" if ours else f"yours, {user}'s"
                    remedy = f"ssh {host} kill -9 {pids}   (they are {whose}; if nobody trains there)"
                else:
                    remedy = f"not of this run, perhaps another person's: ask whose they are (processes {pids})"
                yield Fault(
                    host, "jobs", f"{what}, whose launcher is gone: they hold devices, memory and ports", remedy,
                    warning=answers.local,
                )  # fmt: skip


def check_locks(answers: Answers) -> Iterator[Fault]:
    """`locks` of each host."""
    for host, fact in answers.facts.items():
        for lock in fact["locks"]:
            stale = lock["age_s"] > LOCK_STALE_S
            what = "its build was killed" if stale else "something builds, or was killed"
            yield Fault(
                host, "locks",
                f"{lock['path']} is {lock['age_s'] / 60:,.0f} min old: {what}, and whoever loads that extension waits "
                "for it for ever",
                f"on {host}: rm {lock['path']}", warning=not stale,
            )  # fmt: skip


def odd_ones(values: Mapping[str, Hashable], here: Hashable = None) -> tuple[Any, list[str]]:
    """What most hosts have (at a tie: `here` if it is among them, else the first host's), and the hosts that have
    something else."""
    if not values:
        return None, []
    counts = Counter(values.values())
    most = max(counts.values())
    tied = [value for value, count in counts.items() if count == most]
    common = here if here in tied else tied[0]
    return common, [host for host, value in values.items() if value != common]


def _room(host: str, name: str, disk: Mapping[str, Any]) -> str:
    """Where to make room."""
    if name == "shared memory":
        return f"give {host}'s container more shared memory (docker --shm-size=8g), or clear {disk['path']}"
    where = (
        "delete old checkpoints or choose a run_dir on a larger disk"
        if name == "run folder"
        else "clear it, or name another folder by its variable"
    )
    return f"free space at {disk['there']} on {host} (`df {disk['there']}`): {where}"


def _some(names: Sequence[str], what: str = "") -> str:
    """`files a, b, c and 4 more`."""
    label = f"{what}{'s' if len(names) > 1 else ''} " if what else ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{label}{', '.join(names[:NAMED])}{more}"

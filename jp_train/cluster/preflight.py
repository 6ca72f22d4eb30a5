"""Is this cluster fit to train? Every host is asked in parallel, and what is wrong is named with host, cause and
remedy: `jp-train preflight`.

One process a host (`cluster/probe.py`, over ssh) answers all questions; `cluster/checks.py` judges the answers of all
hosts together. Nothing is left on any
host afterwards: the probes end with their ssh, a hung one is killed, and each has a limited life in any case.
"""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jp_train.cluster import checks, network_checks
from jp_train.cluster.bandwidth import host_rates
from jp_train.cluster.checks import CHECKS
from jp_train.cluster.conversation import Conversation
from jp_train.cluster.environment import EXPORTED_BY_DEEPSPEED, is_secret, passed_environment
from jp_train.cluster.facts import code_digests, launched_jobs
from jp_train.cluster.findings import Fault, Report, gib, rate_text
from jp_train.cluster.hostfile import parse_hostfile, runs_locally
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.reach import CONNECTS_AT_ONCE
from jp_train.cluster.remote import CONNECT_TIMEOUT_S, Cause, run_on_hosts
from jp_train.config import RunConfig, dump_config, load_config
from jp_train.errors import ConfigError
from jp_train.run.lock import LAUNCH_ID

DEFAULT_TIMEOUT_S = 10.0
"""Seconds that a host may take for one answer. Loading torch, and the all-reduce, may take twice as long."""
CONNECT_S = 2.0
"""Seconds in which one host must reach another one's listener."""
SHARED_WAIT_S = 3.0
"""A network file system may show a new file so many seconds late."""
PINGS = 3
WAITED = re.compile("timed? ?out|Connection closed by peer|Connection reset", re.IGNORECASE)
MARGIN_S = 3.0
"""An all-reduce that times out is told so many seconds later at most."""
LIFETIME_S = 300
"""A probe that nobody ends, ends by itself."""


def preflight(
    options: LaunchOptions,
    *,
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    skip: Collection[str] = (),
    own_launches: Collection[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Report:
    """Examine the hosts that `options` select, and report.

    With `config`, the run folder, the data and the configuration are looked at too. `skip`: names of CHECKS to leave
    out. `own_launches`: ids of launches whose processes are expected. `environ`: the launching shell's; the probes get
    what the ranks would get of it. Raises ConfigError (configuration, filter, unknown check) and LaunchError
    (hostfile).
    """
    unknown = [name for name in skip if name not in CHECKS]
    if unknown:
        raise ConfigError(f"there is no check {unknown[0]!r} to skip; there are {', '.join(CHECKS)}")
    if not 0 < timeout_s < LIFETIME_S / 4:
        raise ConfigError(f"--timeout {timeout_s:g} is not between 0 and {LIFETIME_S // 4} seconds")
    cfg = None if config is None else load_config(config, overrides)
    question = {"config": None if config is None else str(config), "overrides": list(overrides)}
    return _Examination(
        options, cfg, question, timeout_s, frozenset(skip), own_launches, os.environ if environ is None else environ
    ).run()


class _Examination:
    """One preflight: asks in phases, because some answers (who listens where) are part of the next question."""

    def __init__(
        self,
        options: LaunchOptions,
        cfg: RunConfig | None,
        question: dict[str, Any],
        timeout_s: float,
        skip: frozenset[str],
        own_launches: Collection[str],
        environ: Mapping[str, str],
    ) -> None:
        self._selection = options.selection()
        self._slots = {host.name: host.slots for host in parse_hostfile(options.hostfile)}
        self._meeting_host = ""
        self._port, self._address = options.master_port, options.master_addr
        self._cfg, self._question, self._timeout_s, self._skip, self._environ = cfg, question, timeout_s, skip, environ
        self._run_dir = os.path.abspath(cfg.run_dir) if cfg else ""
        self._id = f"{checks.PREFLIGHT}{uuid.uuid4().hex[:12]}"
        self._launches = [*own_launches, self._id]
        self._local = runs_locally(self._selection)
        self._findings: list[Fault] = []
        self._notes: list[str] = []
        self._hosts: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._phase = 0

    def run(self) -> Report:
        argv = [sys.executable, "-m", "jp_train.cluster.probe"]
        env = probe_environment(self._environ) | {LAUNCH_ID: self._id, "JP_TRAIN_PROBE_LIFETIME_S": str(LIFETIME_S)}
        hosts = list(self._selection)
        with Conversation(
            hosts, argv, limit_s=LIFETIME_S, local=hosts if self._local else (), cwd=os.getcwd(), env=env
        ) as self._talk:
            with self._progress("every host as it is", CONNECT_TIMEOUT_S + self._timeout_s):
                facts = self._facts()
            with self._progress("clocks and the run folder", (PINGS + 3) * self._timeout_s + SHARED_WAIT_S):
                self._clocks(facts)
                self._shared(self._present(facts))
            with self._progress("who reaches whom", 3 * self._timeout_s + CONNECT_S * self._rounds()):
                may_meet = self._reach(facts)
            if self._cfg is not None and "data" not in self._skip:
                with self._progress("the data", 2 * self._timeout_s):
                    self._data(facts)
            # CPU hosts load torch for the all-reduce only
            if with_torch := [host for host in self._present(facts) if may_meet or facts[host]["devices"]]:
                with self._progress("torch", 2 * self._timeout_s):
                    with_torch = self._torch(with_torch, facts)
            if may_meet and len(with_torch) > 1:
                with self._progress("an all-reduce", 3 * self._timeout_s + MARGIN_S):
                    self._bandwidth(with_torch, facts)
            lost = self._talk.lost
        self._find(None, checks.check_answers(lost, sys.executable, os.getcwd()))
        self._end_hung([host for host, answer in lost.items() if answer.cause is Cause.TIMEOUT])
        order = {host: number for number, host in enumerate(self._selection)}
        found = sorted(self._findings, key=lambda fault: order.get(fault.host, -1))
        if self._skip:
            self._notes.append(f"not looked at, as asked: {', '.join(name for name in CHECKS if name in self._skip)}")
        if self._cfg is None:
            self._notes.append("not looked at without a CONFIG: configuration, run folder, data")
        return Report(
            faults=[fault for fault in found if not fault.warning],
            warnings=[fault for fault in found if fault.warning],
            hosts=self._hosts,
            notes=self._notes,
            seconds=time.monotonic() - self._began,
            selected=list(self._selection),
        )

    # -- phases ------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, dict[str, Any]]:
        question = {
            "ask": "facts", **self._question, "run_dir": self._run_dir, "own_launches": self._launches,
            "load_torch": "bandwidth" not in self._skip and len(self._selection) > 1,
        }  # fmt: skip
        facts = self._ask(
            dict.fromkeys(self._selection, question),
            "its versions, disks and processes",
            CONNECT_TIMEOUT_S + self._timeout_s,
        )
        facts, unknown = checks.settled(facts)
        self._find(None, unknown)
        here = launched_jobs(self._launches)
        self._find("versions", checks.check_versions(facts))
        self._find("code", checks.check_code(facts, code_digests()))
        self._find("config", checks.check_config(facts, dump_config(self._cfg) if self._cfg else None))
        self._find("devices", checks.check_devices(facts, self._selection, self._slots))
        self._find("devices", checks.check_machines(facts))
        self._find("devices", checks.check_busy(facts, self._selection, local=self._local))
        self._find("disk", checks.check_disks(facts, checkpoint_bytes(self._cfg) if self._cfg else 0))
        self._find("jobs", checks.check_jobs(facts, here, local=self._local))
        self._find("locks", checks.check_locks(facts))
        for host, fact in facts.items():
            packages = fact["packages"]
            self._hosts[host] = {
                "slots": len(self._selection[host]), "GPUs": fact["devices"], "cores": fact["cores"], "python": fact["python"],
                "torch": packages.get("torch", "-"), "deepspeed": packages.get("deepspeed", "-"),
            }  # fmt: skip
            if fact["driver"]:
                self._hosts[host]["driver"] = fact["driver"]
            disk = fact["disks"].get("run folder") or fact["disks"].get("temporary files", {})
            self._hosts[host]["free"] = gib(disk["free"]) if "free" in disk else "-"
        if facts and not any(fact["devices"] for fact in facts.values()):
            self._notes.append("no GPU on any host: slots are CPU processes, and were not compared with devices")
        return facts

    def _clocks(self, facts: Mapping[str, Any]) -> None:
        if "clock" in self._skip:
            return
        best: dict[str, tuple[float, float]] = {}
        for _ in range(PINGS):
            asked = time.time()
            for host, said in self._talk.ask(
                {host: {"ask": "clock"} for host in facts}, timeout_s=self._timeout_s, what="the time"
            ).items():
                if "answer" in said:
                    offset = (said["answer"]["time"] - (asked + said["came"]) / 2, (said["came"] - asked) / 2)
                    best[host] = min(best.get(host, offset), offset, key=lambda pair: pair[1])
        for host, (ahead, uncertainty) in best.items():
            self._hosts[host]["clock"] = f"{ahead:+.2f} s" if abs(ahead) > uncertainty else "0 s"
        self._find("clock", checks.check_clocks(best))

    def _shared(self, hosts: Sequence[str]) -> None:
        if self._cfg is None or "shared" in self._skip or len(hosts) < 2:
            return
        first, *others = hosts
        file = {"folder": self._run_dir, "name": f".jp_train_{self._id}", "text": uuid.uuid4().hex}
        placed = self._ask({first: {"ask": "place", **file}}, "a file in the run folder", self._timeout_s)
        if first not in placed:
            return
        error = placed[first].get("error", "")
        missing: list[str] = []
        folder = placed[first].get("folder", self._run_dir)
        if not error:
            file["folder"] = folder
            try:
                seen = self._ask(
                    {host: {"ask": "seen", **file, "wait_s": SHARED_WAIT_S} for host in others},
                    "the run folder",
                    SHARED_WAIT_S + self._timeout_s,
                )
                missing = [host for host in others if host in seen and not seen[host]["seen"]]
            finally:
                self._ask({first: {"ask": "take_away", **file}}, "removing that file", self._timeout_s)
        self._find("shared", checks.check_shared(first, folder, missing, error))

    def _reach(self, facts: Mapping[str, Any]) -> bool:
        """Ports and pairs. Returns whether all hosts that answer can meet for an all-reduce."""
        hosts = self._present(facts)
        if not hosts or ("port" in self._skip and "reach" in self._skip and "bandwidth" in self._skip):
            return False
        first = hosts[0]
        listening = self._ask(
            {host: {"ask": "listen", "master_port": self._port if host == first else None} for host in hosts},
            "its network addresses",
            self._timeout_s,
        )
        if first not in listening:
            return False
        self._meeting_host = first
        told_first = [*facts[first]["addresses"], listening[first]["fabric"].get("address", "")]
        # another host stands in for a first one that does not answer
        given = self._address if first == next(iter(self._selection)) else ""
        self._address = given or ("127.0.0.1" if self._local else told_first[0])
        doors = {
            host: [told["fabric"]["address"], told["fabric"]["port"], told["greeting"]]
            for host, told in listening.items()
            if "port" in told["fabric"] and (not told["fabric"]["address"].startswith("127.") or len(hosts) == 1)
        }
        master = listening[first]["master"]
        questions: dict[str, dict[str, Any]] = {}
        for host in listening:
            targets = {other: door for other, door in doors.items() if other != host}
            if host != first and not master.get("error"):
                targets["(master)"] = [self._address, self._port, listening[first]["greeting"]]
            questions[host] = {"ask": "reach", "targets": targets, "timeout_s": CONNECT_S}
        told = {
            host: answer["failed"]
            for host, answer in self._ask(
                questions, "the other hosts", self._timeout_s + CONNECT_S * self._rounds()
            ).items()
        }
        self._ask({host: {"ask": "close"} for host in listening}, "closing its ports", self._timeout_s)
        unreached = {host: failed.pop("(master)") for host, failed in told.items() if "(master)" in failed}
        self._find("port", network_checks.check_port(first, self._address, self._port, master, unreached))
        self._find("reach", network_checks.check_reach(listening, told, alone=len(hosts) == 1))
        for host, answer in listening.items():
            self._hosts[host]["address"] = answer["fabric"].get("address", "-")
        if len(hosts) < 2 or "bandwidth" in self._skip:
            return False
        blocked = (
            master.get("error") or unreached or any(told.values()) or len(doors) < len(hosts) or set(told) != set(hosts)
        )
        if blocked:
            self._notes.append("no all-reduce was made: not all hosts reach each other")
        return not blocked

    def _data(self, facts: Mapping[str, Any]) -> None:
        hosts = [host for host in self._present(facts) if not isinstance(facts[host]["config"], dict)]
        questions = {host: {"ask": "data", **self._question, "number": number} for number, host in enumerate(hosts)}
        self._find("data", checks.check_data(self._ask(questions, "the data", 2 * self._timeout_s)))

    def _torch(self, hosts: Sequence[str], facts: Mapping[str, Any]) -> list[str]:
        """Returns the hosts where it can be loaded."""
        failed: dict[str, str] = {}
        told = self._ask({host: {"ask": "torch"} for host in hosts}, "torch", 2 * self._timeout_s, failed)
        broken = [
            Fault(
                host,
                "versions",
                f"torch cannot be loaded: {error}",
                f"on {host}: install the torch that the others have",
            )
            for host, error in failed.items()
        ]
        self._find("versions", [*broken, *checks.check_torch(told, facts, self._selection)])
        blind = [host for host in told if facts[host]["devices"] and told[host]["devices"] <= self._selection[host][0]]
        if blind:  # a fault of theirs already, and the others would wait for them
            self._notes.append(f"no all-reduce was made: torch cannot use the GPUs of {', '.join(blind)}")
            return []
        return list(told)

    def _bandwidth(self, hosts: Sequence[str], facts: Mapping[str, Any]) -> None:
        if hosts[0] != self._meeting_host:
            self._notes.append(
                f"no all-reduce was made: {self._meeting_host}, where the ranks would meet, cannot take part"
            )
            return
        gpu = all(facts[host]["devices"] for host in hosts)
        limit = (3 if gpu else 1) * self._timeout_s  # NCCL takes seconds to make its connections
        common = {
            "ask": "bandwidth",
            "world": len(hosts),
            "address": self._address,
            "port": self._port,
            "timeout_s": limit,
        }
        devices = {host: self._selection[host][0] if gpu else None for host in hosts}
        failed: dict[str, str] = {}
        measured = self._ask(
            {host: {**common, "rank": rank, "gpu": devices[host]} for rank, host in enumerate(hosts)},
            "an all-reduce",
            limit + MARGIN_S,
            failed,
        )
        if len(measured) < len(hosts):
            # they made it fail for the others, who are well
            silent = [host for host in hosts if host in self._talk.lost]
            self._notes.append(
                f"the all-reduce failed{': ' + ', '.join(silent) + ' stopped answering' if silent else ''}"
            )
            if silent and gpu:
                self._notes.append(
                    "NCCL ends the processes of an all-reduce that fails or hangs: of hosts that broke off there, look at the fabric "
                    "(NCCL_DEBUG=INFO, `ibstat`, NCCL_IB_HCA, NCCL_SOCKET_IFNAME) before their ssh"
                )
            # the others only waited for these
            own = {host: error for host, error in failed.items() if not WAITED.search(error)}
            for host, error in (own or failed).items() if not silent else ():
                remedy = f"see what {host} says: NCCL_DEBUG=INFO (GPUs), and that {self._address}:{self._port} is its way to {hosts[0]}"
                self._findings.append(Fault(host, "bandwidth", f"the all-reduce failed: {error}", remedy))
            return
        rates = host_rates(hosts, measured)
        backend = measured[hosts[0]]["backend"]
        for host, ways in rates.items():
            self._hosts[host] |= {name: rate_text(rate) for name, rate in ways.items()}
        slowest = min(rates, key=lambda host: min(rates[host].values()))
        bus = min(measured[host]["all_reduce"] for host in hosts)
        self._notes.append(
            f"all-reduce over {len(hosts)} hosts ({backend}, {measured[hosts[0]]['bytes'] >> 10:,} KiB): {rate_text(bus)} on each host's link; "
            f"slowest host {slowest} ({rate_text(min(rates[slowest].values()))})"
        )
        self._find("bandwidth", network_checks.check_bandwidth(rates, backend))

    # -- tools -------------------------------------------------------------------------------------

    def _ask(
        self,
        questions: Mapping[str, Mapping[str, Any]],
        what: str,
        timeout_s: float,
        failed: dict[str, str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Answers of the hosts that could give one; a question that failed there is a fault of its own, or goes to
        `failed`."""
        answers = {}
        for host, said in self._talk.ask(questions, timeout_s=timeout_s, what=what).items():
            if "answer" in said:
                answers[host] = said["answer"]
            elif failed is not None:
                failed[host] = str(said.get("error"))
            else:
                remedy = f"see that {host} has the same jp_train and packages as this host"
                self._findings.append(Fault(host, "answer", f"could not tell {what}: {said.get('error')}", remedy))
        return {host: answers[host] for host in questions if host in answers}

    def _rounds(self) -> int:
        """Of connections that one host makes to all others."""
        return -(-len(self._selection) // CONNECTS_AT_ONCE)

    def _present(self, facts: Mapping[str, Any]) -> list[str]:
        """Hosts whose facts are known, and that still answer."""
        return [host for host in self._talk.hosts if host in facts]

    def _find(self, check: str | None, found: Iterable[Fault]) -> None:
        if check is None or check not in self._skip:
            self._findings.extend(found)

    def _end_hung(self, hosts: Sequence[str]) -> None:
        """A stopped probe does not see that its ssh is gone: it is killed by its mark."""
        if not hosts:
            return
        command = [sys.executable, "-m", "jp_train.cluster.signals", self._id, "9"]
        answers = run_on_hosts(
            hosts, command, timeout_s=self._timeout_s / 2, cwd=os.getcwd(), local=hosts if self._local else ()
        )
        for host, answer in answers.items():
            if not answer.ok:
                self._notes.append(
                    f"{host}: its probe could not be ended ({answer.summary}); it ends by itself within {LIFETIME_S} s"
                )

    @contextmanager
    def _progress(self, what: str, limit_s: float) -> Iterator[None]:
        self._phase += 1
        phases = 5 if self._cfg is None or "data" in self._skip else 6
        print(
            f"preflight: {self._phase}/{phases} {what} ({len(self._talk.hosts)} hosts, {time.monotonic() - self._began:.1f} s, "
            f"at most {limit_s:g} s for this)",
            file=sys.stderr,
            flush=True,
        )
        yield


def probe_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the ranks would get of the launching shell: what `launch` passes on, and what DeepSpeed's runner exports
    by itself."""
    env = dict(line.partition("=")[::2] for line in passed_environment(environ).lines)
    exported = {
        name: value for name, value in environ.items() if name.startswith(EXPORTED_BY_DEEPSPEED) and not is_secret(name)
    }
    return {**exported, **env, "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1")}


def checkpoint_bytes(cfg: RunConfig) -> int:
    """At least so many bytes has one checkpoint of this run: weights and AdamW's moments in fp32 of the language model
    alone; 0 where that does not learn.

    A lower bound without building the model, which would take seconds; `jp-train forecast` has the whole sum.
    """
    text = cfg.model.language
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    elements = 2 * text.vocab_size * text.hidden_size + text.layers * layer
    return elements * 12 if "language_model" in cfg.stage.trainable else 0

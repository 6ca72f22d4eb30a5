"""Is this cluster fit to train? All hosts are examined in parallel, and what is wrong is named with host, cause and
remedy: `jp-train preflight`.

One process per host (`cluster/probe.py`, over ssh) answers all questions; `cluster/checks.py` lists the checks, which
judge the answers of all hosts together. Nothing is left on any host afterwards: the probes end with their ssh, a hung
one is killed, and each has a limited lifetime in any case.
"""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jp_train.cluster.answers import Answers
from jp_train.cluster.bandwidth import host_rates
from jp_train.cluster.checks import CHECK_NAMES, CHECKS
from jp_train.cluster.conversation import Conversation
from jp_train.cluster.environment import passed_environment
from jp_train.cluster.facts import code_digests, launched_jobs
from jp_train.cluster.findings import Fault, Report, gib, rate_text
from jp_train.cluster.host_checks import PREFLIGHT, check_answers, settled
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
"""Seconds by which a network file system may show a new file late."""
PINGS = 3
WAITED = re.compile("timed? ?out|Connection closed by peer|Connection reset", re.IGNORECASE)
MARGIN_S = 3.0
"""Seconds within which an all-reduce that has timed out is reported."""
LIFETIME_S = 300
"""Seconds after which a probe ends even if it was not ended."""


def preflight(
    options: LaunchOptions,
    *,
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    skip: Collection[str] = (),
    progress: bool = True,
) -> Report:
    """Examine the hosts that `options` select, and report.

    With `config`, the run folder, the data and the configuration are examined too. `skip`: names of CHECKS to leave
    out; `progress`: a line on stderr before each phase. The probes get what the ranks would get of this shell's
    environment. Raises ConfigError (configuration, filter, unknown check) and LaunchError (hostfile).
    """
    unknown = [name for name in skip if name not in CHECK_NAMES]
    if unknown:
        raise ConfigError(f"there is no check {unknown[0]!r} to skip; there are {', '.join(CHECK_NAMES)}")
    if not 0 < timeout_s < LIFETIME_S / 4:
        raise ConfigError(f"--timeout {timeout_s:g} is not between 0 and {LIFETIME_S // 4} seconds")
    return _Examination(options, config, overrides, timeout_s, frozenset(skip), progress).run()


class _Examination:
    """One preflight, in phases, because some answers (the ports that are open) are part of the next question. After
    each phase the checks that look at its answers are made."""

    def __init__(
        self,
        options: LaunchOptions,
        config: str | os.PathLike[str] | None,
        overrides: Sequence[str],
        timeout_s: float,
        skip: frozenset[str],
        progress: bool,
    ) -> None:
        options = options.with_free_port()
        self._cfg = cfg = None if config is None else load_config(config, overrides)
        self._question = {"config": None if config is None else str(config), "overrides": list(overrides)}
        self._selection, self._timeout_s, self._skip = options.selection(), timeout_s, skip
        self._progress_lines = progress
        self._master_addr, self._ssh_args = options.master_addr, options.ssh_words()
        self._run_dir = os.path.abspath(cfg.run_dir) if cfg else ""
        self._id = f"{PREFLIGHT}{uuid.uuid4().hex[:12]}"
        self._local = runs_locally(self._selection)
        self._env = probe_environment(os.environ, options, local=self._local)
        self._credentials = passed_environment(os.environ, more=options.env, launcher=options.launcher).credentials
        self._answers = Answers(
            selection=self._selection,
            slots={host.name: host.slots for host in parse_hostfile(options.hostfile)},
            local=self._local,
            port=options.master_port,
            code=code_digests(),
            config=dump_config(cfg) if cfg else None,
            checkpoint_bytes=checkpoint_bytes(cfg) if cfg else 0,
            run_dir=self._run_dir,
        )
        self._faults: list[Fault] = []
        self._notes: list[str] = []
        self._hosts: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._phase = 0

    def run(self) -> Report:
        argv = [sys.executable, "-m", "jp_train.cluster.probe"]
        env = self._env | {LAUNCH_ID: self._id, "JP_TRAIN_PROBE_LIFETIME_S": str(LIFETIME_S)}
        hosts = list(self._selection)
        with Conversation(
            hosts, argv, limit_s=LIFETIME_S, local=hosts if self._local else (), ssh_args=self._ssh_args,
            cwd=os.getcwd(), env=env,
        ) as self._talk:  # fmt: skip
            self._ask_all()
            lost = self._talk.lost
        self._faults.extend(check_answers(lost, sys.executable, os.getcwd()))
        self._end_hung([host for host, answer in lost.items() if answer.cause is Cause.TIMEOUT])
        order = {host: number for number, host in enumerate(self._selection)}
        faults = sorted(self._faults, key=lambda fault: order.get(fault.host, -1))
        if self._skip:
            skipped = ", ".join(name for name in CHECK_NAMES if name in self._skip)
            self._notes.append(f"not looked at, as asked: {skipped}")
        if self._cfg is None:
            self._notes.append("not looked at without a CONFIG: configuration, run folder, data")
        return Report(
            faults=[fault for fault in faults if not fault.warning],
            warnings=[fault for fault in faults if fault.warning],
            hosts=self._hosts,
            notes=self._notes,
            seconds=time.monotonic() - self._began,
            selected=list(self._selection),
        )

    def _ask_all(self) -> None:
        """All phases, in their order."""
        with self._progress("every host as it is", CONNECT_TIMEOUT_S + self._timeout_s):
            self._ask_facts()
        with self._progress("clocks and the run folder", (PINGS + 3) * self._timeout_s + SHARED_WAIT_S):
            self._ask_clocks()
            self._ask_shared(self._present())
        with self._progress("who reaches whom", 3 * self._timeout_s + CONNECT_S * self._rounds()):
            can_meet = self._ask_reach()
        if self._cfg is not None and self._needed("data"):
            with self._progress("the data", 2 * self._timeout_s):
                self._ask_data()
        # CPU hosts load torch for the all-reduce only
        asked = can_meet or self._needed("torch")
        with_torch = [host for host in self._present() if can_meet or self._answers.facts[host]["devices"]]
        if asked and with_torch:
            with self._progress("torch", 2 * self._timeout_s):
                with_torch = self._ask_torch(with_torch)
        if can_meet and len(with_torch) > 1:
            with self._progress("an all-reduce", 3 * self._timeout_s + MARGIN_S):
                self._ask_bandwidth(with_torch)

    # -- phases ------------------------------------------------------------------------------------

    def _ask_facts(self) -> None:
        question = {
            "ask": "facts", **self._question, "run_dir": self._run_dir, "expected_launches": [self._id],
            "load_torch": self._needed("bandwidth") and len(self._selection) > 1,
        }  # fmt: skip
        sent = self._ask(
            dict.fromkeys(self._selection, question),
            "its versions, disks and processes",
            CONNECT_TIMEOUT_S + self._timeout_s,
        )
        facts, unknown = settled(sent)
        self._faults.extend(unknown)
        self._answers.facts, self._answers.jobs = facts, launched_jobs([self._id])
        self._judge("facts")
        for host, fact in facts.items():
            packages = fact["packages"]
            self._hosts[host] = {
                "slots": len(self._selection[host]), "GPUs": fact["devices"], "cores": fact["cores"],
                "python": fact["python"], "torch": packages.get("torch", "-"),
                "deepspeed": packages.get("deepspeed", "-"),
            }  # fmt: skip
            if fact["driver"]:
                self._hosts[host]["driver"] = fact["driver"]
            disk = fact["disks"].get("run folder") or fact["disks"].get("temporary files", {})
            self._hosts[host]["free"] = gib(disk["free"]) if "free" in disk else "-"
        if facts and not any(fact["devices"] for fact in facts.values()):
            self._notes.append("no GPU on any host: slots are CPU processes, and were not compared with devices")

    def _ask_clocks(self) -> None:
        if not self._needed("clocks"):
            return
        best = self._answers.clocks
        for _ in range(PINGS):
            sent_at, sent = time.time(), time.monotonic()
            replies = self._talk.ask(
                {host: {"ask": "clock"} for host in self._answers.facts}, timeout_s=self._timeout_s, what="the time"
            )
            for host, reply in replies.items():
                if "answer" in reply:
                    half = (reply["came"] - sent) / 2
                    offset = (reply["answer"]["time"] - sent_at - half, half)
                    best[host] = min(best.get(host, offset), offset, key=lambda pair: pair[1])
        for host, (ahead, uncertainty) in best.items():
            self._hosts[host]["clock"] = f"{ahead:+.2f} s" if abs(ahead) > uncertainty else "0 s"
        self._judge("clocks")

    def _ask_shared(self, hosts: Sequence[str]) -> None:
        if self._cfg is None or not self._needed("shared") or len(hosts) < 2:
            return
        first, *others = hosts
        file = {"folder": self._run_dir, "name": f".jp_train_{self._id}", "text": uuid.uuid4().hex}
        written = self._ask({first: {"ask": "write_marker", **file}}, "a file in the run folder", self._timeout_s)
        if first not in written:
            return
        answers = self._answers
        answers.shared_writer, answers.shared_error = first, written[first].get("error", "")
        file["folder"] = answers.shared_folder = written[first].get("folder", self._run_dir)
        if not answers.shared_error:
            try:
                seen = self._ask(
                    {host: {"ask": "has_marker", **file, "wait_s": SHARED_WAIT_S} for host in others},
                    "the run folder",
                    SHARED_WAIT_S + self._timeout_s,
                )
                answers.shared_missing = [host for host in others if host in seen and not seen[host]["seen"]]
            finally:
                self._ask({first: {"ask": "remove_marker", **file}}, "removing that file", self._timeout_s)
        self._judge("shared")

    def _ask_reach(self) -> bool:
        """Ports and pairs. Returns whether all hosts that answer can meet for an all-reduce."""
        hosts, answers = self._present(), self._answers
        if not hosts or not (self._needed("reach") or self._needed("bandwidth")):
            return False
        first = hosts[0]
        answers.listening = listening = self._ask(
            {host: {"ask": "listen", "master_port": answers.port if host == first else None} for host in hosts},
            "its network addresses",
            self._timeout_s,
        )
        if first not in listening:
            return False
        answers.rendezvous_host, answers.alone = first, len(hosts) == 1
        answers.address = self._rendezvous_address(first)
        listeners = {
            host: [opened["fabric"]["address"], opened["fabric"]["port"], opened["greeting"]]
            for host, opened in listening.items()
            if "port" in opened["fabric"] and (not opened["fabric"]["address"].startswith("127.") or answers.alone)
        }
        master = listening[first]["master"]
        questions: dict[str, dict[str, Any]] = {}
        for host in listening:
            targets = {other: listener for other, listener in listeners.items() if other != host}
            if host != first and not master.get("error"):
                targets["(master)"] = [answers.address, answers.port, listening[first]["greeting"]]
            questions[host] = {"ask": "reach", "targets": targets, "timeout_s": CONNECT_S}
        replies = self._ask(questions, "the other hosts", self._timeout_s + CONNECT_S * self._rounds())
        answers.unreached = {host: reply["failed"] for host, reply in replies.items()}
        self._ask({host: {"ask": "close"} for host in listening}, "closing its ports", self._timeout_s)
        answers.unreached_port = {
            host: failed.pop("(master)") for host, failed in answers.unreached.items() if "(master)" in failed
        }
        self._judge("reach")
        for host, opened in listening.items():
            self._hosts[host]["address"] = opened["fabric"].get("address", "-")
        if answers.alone or not self._needed("bandwidth"):
            return False
        cut_off = master.get("error") or answers.unreached_port or any(answers.unreached.values())
        if cut_off or len(listeners) < len(hosts) or set(answers.unreached) != set(hosts):
            self._notes.append("no all-reduce was made: not all hosts reach each other")
            return False
        return True

    def _rendezvous_address(self, first: str) -> str:
        """The address of `first` for the others: --master-addr, if it is that of the first selected host (not of one
        that takes its place because it does not answer)."""
        given = self._master_addr if first == next(iter(self._selection)) else ""
        fabric = self._answers.listening[first]["fabric"]
        addresses = [*self._answers.facts[first]["addresses"], fabric.get("address", "")]
        return given or ("127.0.0.1" if self._local else str(addresses[0]))

    def _ask_data(self) -> None:
        hosts = [host for host in self._present() if not isinstance(self._answers.facts[host]["config"], dict)]
        # over the pipe of ssh, as the probes' command lines are in the process lists
        question = {"ask": "data", **self._question, "credentials": dict(self._credentials)}
        questions = {host: {**question, "number": number} for number, host in enumerate(hosts)}
        self._answers.data = self._ask(questions, "the data", 2 * self._timeout_s)
        self._judge("data")

    def _ask_torch(self, hosts: Sequence[str]) -> list[str]:
        """Returns the hosts where it can be loaded."""
        answers = self._answers
        answers.torch = self._ask(
            {host: {"ask": "torch"} for host in hosts}, "torch", 2 * self._timeout_s, answers.torch_errors
        )
        self._judge("torch")
        blind = [
            host
            for host, build in answers.torch.items()
            if answers.facts[host]["devices"] and (build["devices"] <= self._selection[host][0] or build.get("broken"))
        ]
        if blind:  # a fault of theirs already, and the others would wait for them
            self._notes.append(f"no all-reduce was made: torch cannot use the GPUs of {', '.join(blind)}")
            return []
        return list(answers.torch)

    def _ask_bandwidth(self, hosts: Sequence[str]) -> None:
        answers = self._answers
        if hosts[0] != answers.rendezvous_host:
            self._notes.append(
                f"no all-reduce was made: {answers.rendezvous_host}, where the ranks would meet, cannot take part"
            )
            return
        gpu = all(answers.facts[host]["devices"] for host in hosts)
        limit = (3 if gpu else 1) * self._timeout_s  # NCCL takes seconds to make its connections
        common = {
            "ask": "bandwidth",
            "world": len(hosts),
            "address": answers.address,
            "port": answers.port,
            "timeout_s": limit,
        }
        devices = {host: self._selection[host][0] if gpu else None for host in hosts}
        errors: dict[str, str] = {}
        measured = self._ask(
            {host: {**common, "rank": rank, "gpu": devices[host]} for rank, host in enumerate(hosts)},
            "an all-reduce",
            limit + MARGIN_S,
            errors,
        )
        if len(measured) < len(hosts):
            self._note_failed_all_reduce([host for host in hosts if host in self._talk.lost], errors, gpu=gpu)
        else:
            answers.rates = host_rates(hosts, measured)
            answers.backend = measured[hosts[0]]["backend"]
            for host, ways in answers.rates.items():
                self._hosts[host] |= {name: rate_text(rate) for name, rate in ways.items()}
            slowest = min(answers.rates, key=lambda host: min(answers.rates[host].values()))
            bus = min(measured[host]["all_reduce"] for host in hosts)
            self._notes.append(
                f"all-reduce over {len(hosts)} hosts ({answers.backend}, {measured[hosts[0]]['bytes'] >> 10:,} KiB): "
                f"{rate_text(bus)} on each host's link; slowest host {slowest} "
                f"({rate_text(min(answers.rates[slowest].values()))})"
            )
        self._judge("bandwidth")

    def _note_failed_all_reduce(self, silent: Sequence[str], errors: Mapping[str, str], *, gpu: bool) -> None:
        """`silent`: hosts that stopped answering. They made it fail for the others, who are well."""
        self._notes.append(f"the all-reduce failed{': ' + ', '.join(silent) + ' stopped answering' if silent else ''}")
        if silent and gpu:
            self._notes.append(
                "NCCL ends the processes of an all-reduce that fails or hangs: of hosts that broke off there, look at "
                "the fabric (NCCL_DEBUG=INFO, `ibstat`, NCCL_IB_HCA, NCCL_SOCKET_IFNAME) before their ssh"
            )
        if not silent:
            # the others only waited for these
            causes = {host: error for host, error in errors.items() if not WAITED.search(error)}
            self._answers.all_reduce_errors = causes or dict(errors)

    # -- tools -------------------------------------------------------------------------------------

    def _ask(
        self,
        questions: Mapping[str, Mapping[str, Any]],
        what: str,
        timeout_s: float,
        failed: dict[str, str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Answers of the hosts that could give one. A question that failed on a host goes to `failed`, or without it
        becomes a fault."""
        answers = {}
        for host, reply in self._talk.ask(questions, timeout_s=timeout_s, what=what).items():
            if "answer" in reply:
                answers[host] = reply["answer"]
            elif failed is not None:
                failed[host] = str(reply.get("error"))
            else:
                remedy = f"see that {host} has the same jp_train and packages as this host"
                self._faults.append(Fault(host, "answer", f"could not tell {what}: {reply.get('error')}", remedy))
        return {host: answers[host] for host in questions if host in answers}

    def _rounds(self) -> int:
        """Of connections that one host makes to all others."""
        return -(-len(self._selection) // CONNECTS_AT_ONCE)

    def _present(self) -> list[str]:
        """Hosts whose facts are known, and that still answer."""
        return [host for host in self._talk.hosts if host in self._answers.facts]

    def _needed(self, phase: str) -> bool:
        """Whether a check that is not skipped looks at the answers of this phase."""
        return any(phase in check.after and check.name not in self._skip for check in CHECKS)

    def _judge(self, phase: str) -> None:
        """Make the checks that look at the answers of this phase."""
        for check in CHECKS:
            if phase in check.after and check.name not in self._skip:
                for find in check.after[phase]:
                    self._faults.extend(find(self._answers))

    def _end_hung(self, hosts: Sequence[str]) -> None:
        """A stopped probe does not see that its ssh is gone: it is killed by its mark."""
        if not hosts:
            return
        command = [sys.executable, "-m", "jp_train.cluster.signals", self._id, "9"]
        answers = run_on_hosts(
            hosts, command, timeout_s=self._timeout_s / 2, cwd=os.getcwd(), local=hosts if self._local else (),
            ssh_args=self._ssh_args,
        )  # fmt: skip
        for host, answer in answers.items():
            if not answer.ok:
                self._notes.append(
                    f"{host}: its probe could not be ended ({answer.summary}); it ends by itself within {LIFETIME_S} s"
                )

    @contextmanager
    def _progress(self, what: str, limit_s: float) -> Iterator[None]:
        self._phase += 1
        phases = 6 if self._cfg is not None and self._needed("data") else 5
        if self._progress_lines:
            print(
                f"preflight: {self._phase}/{phases} {what} ({len(self._talk.hosts)} hosts, "
                f"{time.monotonic() - self._began:.1f} s, at most {limit_s:g} s for this)",
                file=sys.stderr,
                flush=True,
            )
        yield


def probe_environment(environ: Mapping[str, str], options: LaunchOptions, *, local: bool) -> dict[str, str]:
    """What the ranks get of the launching shell, beside which a local probe has all of it. Raises as
    `passed_environment`."""
    passed = {} if local else passed_environment(environ, more=options.env, launcher=options.launcher).variables
    return {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1"), **passed}


def checkpoint_bytes(cfg: RunConfig) -> int:
    """A lower bound of the bytes of one checkpoint: weights and AdamW's moments in fp32 of the language model alone; 0
    where that does not learn.

    The model is not built for it, which would take seconds; `jp-train forecast` has the whole sum.
    """
    text = cfg.model.language
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    elements = 2 * text.vocab_size * text.hidden_size + text.layers * layer
    return elements * 12 if "language_model" in cfg.stage.trainable else 0

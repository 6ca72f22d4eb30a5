"""Several hosts for a campaign (`tests/multinode/cluster_rig.py`): two that train, and one that has the object store,
wandb's server and mostly the launch."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.config import RunConfig
from tests.chaos.chaos_world import ROOT, ROWS, World, configuration
from tests.chaos.scene import MissedError, Scene
from tests.multinode.cluster_rig import Cluster
from tests.multinode.host_faults import build_clock, clock_environment, give_clock, set_clock
from tests.run.wandb_server import KEY
from tests.small_disk import ThrottledDisk

TRAINING = ("node1", "node2")
HEAD = "node3"
"""Trains nothing: it has the object store, wandb's server, and most launches."""
STORE_PORT, WANDB_PORT = 8000, 8001
SERVICES = ("tests.chaos.object_store", "tests.run.wandb_server")
STORED = ("digits-und", "scenes-gen")
"""Sources that are read from the object store, the others from files."""
STORE_TRIES = 7
"""Tries of a read: 6.3 s of waiting between them."""
GOES_ON_S = 90.0
LEFT_S = 15.0


class Service:
    """A server on HEAD, as a process; it can be killed, started again, stopped, and told to misbehave. `words`: of its
    command, before address and port."""

    def __init__(self, rig: Cluster, port: int, *words: str) -> None:
        self._rig = rig
        self._argv = [sys.executable, "-m", *words, rig.nodes[HEAD].address, str(port)]
        self.url = f"http://{rig.nodes[HEAD].address}:{port}"
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Does nothing while it runs."""
        if not self.running:
            self._process = self._rig.popen(HEAD, self._argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        assert self._process is not None
        self._rig.send(self._process, signal.SIGKILL)
        self._process.send_signal(signal.SIGCONT)  # where it was stopped
        self._process.wait(10)

    def misbehave(self, how: str) -> None:
        """A line for its input."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{how}\n")
        self._process.stdin.flush()

    def stop(self, stopped: bool) -> None:
        """Hang, or go on."""
        assert self._process is not None
        if not self.running:
            return
        self._rig.send(self._process, signal.SIGSTOP if stopped else signal.SIGCONT)
        if not stopped:  # the process that entered the host stopped with it
            self._process.send_signal(signal.SIGCONT)


class Hosts:
    """The hosts, the store on one of them, and clocks that can be set where there is a C compiler. A context."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._cluster = Cluster(folder, hosts=3)
        self._netrc = folder / "netrc"
        self.clock: Path | None = None
        self.disk: ThrottledDisk | None = None

    def __enter__(self) -> Hosts:
        self.rig = self._cluster.__enter__()
        try:
            self.rig.hostfile.write_text("".join(f"{host} slots=1\n" for host in TRAINING))
            self.clock = build_clock(self._folder)
            if self.clock is not None:
                for host in self.rig.names:
                    clock_environment(self.rig, host, self.clock)
                for host in TRAINING:
                    give_clock(self.rig, host, self.clock)
            self.store = Service(self.rig, STORE_PORT, SERVICES[0], str(self._world.data))
            self.wandb = Service(self.rig, WANDB_PORT, SERVICES[1])
            # where a login on the hosts leaves the key, which a launch passes on to nobody
            self._netrc.write_text(f"machine {self.wandb.url.removeprefix('http://')} login user password {KEY}\n")
        except BaseException:
            self.rig.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.rig.close()

    def configuration(self, run_dir: Path, steps: int, **changes: Any) -> RunConfig:
        """The run of the local campaign, with some of its shards on the store."""
        values = {
            "engine.micro_batch_rows": ROWS // len(TRAINING),
            "data.io_retries": STORE_TRIES,
            "checkpoint.keep_last": 2,
        } | {f"data.sources.{source}.shards": self._stored(source) for source in STORED}
        return configuration(self._world, run_dir, steps, **(values | changes))

    def _stored(self, source: str) -> str:
        """What `data.sources.NAME.shards` is for a source of the store."""
        last = max(path.stem for path in (self._world.data / source).glob("*.tar"))
        return f"{self.store.url}/{source}/{{{'0' * len(last)}..{last}}}.tar"

    def launch(self, host: str, config: Path, terminal: Path, *words: str) -> subprocess.Popen[str]:
        """`jp-train launch` on a host; what it prints goes to `terminal`. `words`: more options, then overrides."""
        environment = {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "XDG_CACHE_HOME": str(self._folder / "cache"),
            "WANDB_BASE_URL": self.wandb.url,
            "NETRC": str(self._netrc),
        }
        if self.clock is not None:
            environment |= clock_environment(self.rig, host, self.clock)
        argv = [sys.executable, "-m", "jp_train", "launch", str(config), "--hostfile", str(self.rig.hostfile)]
        argv += ["--env", "NETRC", *words]
        argv += ["preset=null", "recipe=null"]  # the file is whole without them
        with terminal.open("w") as file:
            return self.rig.popen(host, argv, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def repair(self) -> None:
        """Everything up, connected, and right, as after a night in which somebody was on call."""
        self.store.start()
        self.wandb.start()
        self.wandb.misbehave("200")
        if self.clock is not None:
            for host in self.rig.names:
                set_clock(self.rig, host, 0.0)
        self.rig.trust_host_keys()
        for host in self.rig.names:
            if not self.rig.nodes[host].up:
                self.rig.start_host(host)

    def left(self, timeout_s: float) -> list[str]:
        """What still runs on any host, after some time to go away; the services are no part of a run."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [
                f"{host}: {pid} {line[:80]}"
                for host in self.rig.names
                for pid, line in self.rig.processes(host)
                if not any(name in line for name in SERVICES)
            ]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)


@dataclass(kw_only=True)
class HostScene(Scene):
    """One life of a run on several hosts: one `jp-train launch`, which may start the ranks more than once."""

    hosts: Hosts
    config: Path
    head: str = HEAD
    """Where the launch runs."""
    launch: subprocess.Popen[str] | None = None
    left_s: float = LEFT_S
    """Time that processes get to go away after the launch."""

    def new_life(self) -> None:
        super().new_life()
        self.left_s = LEFT_S

    @property
    def rig(self) -> Cluster:
        return self.hosts.rig

    def rank(self, host: str) -> int:
        """The process of the rank on a host. Raises MissedError when there is none."""
        for pid, line in self.rig.processes(host):
            if "-m jp_train train" in line:
                return pid
        raise MissedError

    def send(self, number: signal.Signals) -> None:
        """A signal to the launch."""
        assert self.launch is not None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            self.rig.send(self.launch, number)

    def finished(self) -> bool:
        """Whether the run has ended, with nothing left to train."""
        try:
            return bool(json.loads((self.run_dir / "status.json").read_text())["state"] == "finished")
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def goes_on(self) -> None:
        """Until a further step is done, or the run has ended: what it survived is over."""
        goal = min(self.step() + 1, self.steps)
        deadline = time.monotonic() + GOES_ON_S
        while self.running() and self.step() < goal:
            if time.monotonic() > deadline:
                self.problems.append(f"no end: no step within {GOES_ON_S:.0f} s after the fault")
                return
            time.sleep(0.05)

    def starts_again(self, act: Callable[[], None], named: str) -> None:
        """Do harm, and wait until the launch has started the ranks again and they train; the cause must be named."""
        done = self._restarts("restarted")
        act()
        self.wait(lambda: len(self._restarts("restarted")) > len(done), poll_s=0.1)
        restart = self._restarts("restart")[-1]
        if not re.search(named, restart["cause"]):
            self.problems.append(f"the cause of the restart does not name {named!r}: {restart['cause'][:300]}")
        resumed = [event["step"] for event in self.events() if event["event"] == "resume"][-1:]
        if resumed and resumed != [restart["resumes_at_step"]]:
            self.problems.append(f"resumed at step {resumed}, and the launch said {restart['resumes_at_step']}")

    def _restarts(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == name]

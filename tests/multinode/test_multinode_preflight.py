"""Real faults planted on real (namespaced) hosts, and what `jp-train preflight` says of each: host, cause, remedy, in
30 seconds, with nothing left behind.

Faults that do not hide each other are planted together and examined by one preflight: one fixture a batch, one test a
fault.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.multinode.cluster_rig import Cluster

ROOT = Path(__file__).resolve().parents[2]
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
SOURCES = ("digits-und", "scenes-und", "text", "digits-gen", "scenes-gen")
REPORTED_IN_S = 30.0
"""With free cores. The hosts of a rig share this machine's, so on a busy one they are slow, as no real host would
be: see `slowness`."""
PORT = 29512


def slowness() -> float:
    """How many runnable processes want each core: 1 on an idle machine."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Outcome:
    """One preflight: its exit code and report, the seconds it took (of cores that were free), and what still ran on
    the hosts after it."""

    returncode: int
    report: dict
    seconds: float
    left: dict
    stderr: str

    def of(self, host: str, check: str, among: str = "faults") -> list[dict]:
        return [fault for fault in self.report[among] if (fault["host"], fault["check"]) == (host, check)]

    def require(self, host: str, check: str, message: str, remedy: str) -> None:
        """Exactly this host's check tells this, with this remedy."""
        faults = self.of(host, check)
        assert any(message in fault["found"] and remedy in fault["remedy"] for fault in faults), json.dumps(
            faults or self.report["faults"], indent=1
        )


@dataclass(frozen=True)
class World:
    """Six hosts, and the files of a run that all of them see."""

    rig: Cluster
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def preflight(
        self, *options: str, meanwhile: Callable[[], None] = lambda: None, with_config: bool = True
    ) -> Outcome:
        """`jp-train preflight` on node1."""
        argv = [sys.executable, "-m", "jp_train", "preflight", *([str(self.config)] if with_config else [])]
        argv += ["--hostfile", str(self.hostfile), "--master-port", str(PORT), "--json", "--timeout", "30", *options]
        env = {"TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"), "OMP_NUM_THREADS": "1"}
        before = {name: {pid for pid, _ in self.rig.processes(name)} for name in self.rig.names}
        began = time.monotonic()
        process = self.rig.popen("node1", argv, env=env, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        meanwhile()
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        seconds = (time.monotonic() - began) / slowness()
        left = {}
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            left = {
                name: [(pid, line) for pid, line in self.rig.processes(name) if pid not in before[name]]
                for name in self.rig.names
            }
            if not any(left.values()):
                break
            time.sleep(0.1)
        assert process.returncode in (0, 5), err
        return Outcome(
            process.returncode, json.loads(out), seconds, {name: lines for name, lines in left.items() if lines}, err
        )

    def firewall(self, host: str, *rules: str) -> None:
        """Packets that come in to a host are judged by these rules of nft."""
        table = "table inet planted { chain input { type filter hook input priority 0; " + "; ".join(rules) + "; }\n}\n"
        done = self.rig.run(host, ["nft", table])
        assert done.returncode == 0, done.stderr

    def heal(self) -> None:
        for name in self.rig.names:
            node = self.rig.nodes[name]
            if node.up:
                os.kill(node.init, signal.SIGCONT)
                self.rig.run(name, ["nft", "flush", "ruleset"])
        self.rig.repair()


def write_shard(folder: Path, members: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


@pytest.fixture(scope="module")
def world(make_cluster: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory) -> World:
    if shutil.which("nft") is None:
        pytest.skip("not installed: nft (Debian: apt-get install nftables)")
    folder = tmp_path_factory.mktemp("preflight")
    for name in SOURCES:
        for source in (name, f"{name}-val"):
            write_shard(folder / "data" / source, {"a.txt": b"one", "a.json": b"{}", "b.txt": b"two"})
    for name, content in (("tokenizer", "tokenizer.json"), ("init", "model.safetensors")):
        (folder / name).mkdir()
        (folder / name / content).write_text("some content")
    (folder / "extensions").mkdir()
    (folder / "run").mkdir()
    shipped = (ROOT / "examples/smoke/stage2.yaml").read_text()
    for ours, theirs in (
        ("run_dir", "runs/smoke/stage2"),
        ("tokenizer", "runs/smoke/tokenizer"),
        ("init", "runs/smoke/stage1"),
        ("data", "runs/smoke/data"),
    ):
        place = folder / ("run/stage2" if ours == "run_dir" else ours)
        shipped = shipped.replace(f" {theirs}\n", f" {place}\n").replace(f" {theirs}}}", f" {place}}}")
    assert "runs/smoke" not in shipped
    (folder / "run.yaml").write_text(shipped)
    rig = make_cluster(hosts=6, slots=1)
    shutil.copy(rig.hostfile, folder / "hostfile")
    return World(rig, folder)


# -- a healthy cluster -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(world: World) -> Outcome:
    return world.preflight("--include", "node1@node2@node3")


def test_a_healthy_cluster_has_no_fault(healthy: Outcome) -> None:
    assert (healthy.returncode, healthy.report["faults"]) == (0, [])
    assert [warning["found"][:15] for warning in healthy.report["warnings"]] == ["not indexed yet"]
    assert set(healthy.report["hosts"]) == {"node1", "node2", "node3"}


def test_the_all_reduce_is_measured_and_names_the_slowest_host(healthy: Outcome) -> None:
    speed = next(note for note in healthy.report["notes"] if note.startswith("all-reduce over 3 hosts (gloo"))
    assert "slowest host node" in speed
    assert all(
        host["sends"].endswith("B/s") and host["receives"].endswith("B/s") for host in healthy.report["hosts"].values()
    )


def test_a_preflight_leaves_no_process_and_no_file(healthy: Outcome, world: World) -> None:
    assert healthy.left == {}
    assert list((world.folder / "run").iterdir()) == []


# -- hosts that do not answer ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def silent(world: World, healthy: Outcome) -> Outcome:
    """node2 is off, node3 has another host key, node4 does not know our key, node5 refuses, node6's sshd hangs, and
    there is no host `nosuch`."""
    rig = world.rig
    rig.stop_host("node2")
    rig.change_host_key("node3")
    other = world.folder / "other_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    rig.mount_over("node4", other.with_suffix(".pub"), rig.folder / "key.pub")
    world.firewall("node5", "tcp dport 22 reject with tcp reset")
    os.kill(rig.nodes["node6"].init, signal.SIGSTOP)
    hostfile = world.hostfile.read_text()
    world.hostfile.write_text(hostfile + "nosuch slots=1\n")
    try:
        return world.preflight()
    finally:
        world.hostfile.write_text(hostfile)
        world.heal()


@pytest.mark.parametrize(
    ("host", "message", "remedy"),
    [
        ("node2", "no", "power node2 on"),
        ("node3", "host key changed", "ssh-keygen -R node3"),
        ("node4", "login refused", "ssh-copy-id node4"),
        ("node5", "connection refused", "start the ssh server on node5"),
        ("node6", "ssh server hangs", "restart its ssh server"),
        ("nosuch", "unknown host name", "correct the name in the hostfile"),
    ],
)
def test_a_host_that_cannot_be_logged_in_to_is_named_with_its_cause(
    silent: Outcome, host: str, message: str, remedy: str
) -> None:
    silent.require(host, "ssh", message, remedy)


def test_hosts_that_are_down_cost_seconds_and_do_not_stop_the_others(silent: Outcome) -> None:
    assert silent.returncode == 5 and set(silent.report["hosts"]) == {"node1"}
    assert silent.seconds <= REPORTED_IN_S and silent.left == {}


# -- hosts that differ -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unlike(world: World, silent: Outcome) -> Outcome:
    """One host each with other code, packages, configuration, data or run folder, and some that an earlier launch
    left things on."""
    rig, folder = world.rig, world.folder
    mine = folder / "unlike"
    shutil.copytree(ROOT / "jp_train", mine / "jp_train", ignore=shutil.ignore_patterns("__pycache__"))
    with open(mine / "jp_train/data/packing.py", "a", encoding="utf-8") as file:
        file.write("# one more line\n")
    rig.mount_over("node2", mine / "jp_train", ROOT / "jp_train")
    (mine / "extensions/fused_adam").mkdir(parents=True)
    lock = mine / "extensions/fused_adam/lock"
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    rig.mount_over("node2", mine / "extensions", folder / "extensions")

    about = (
        Path(str(importlib.metadata.distribution("torch").locate_file("")))
        / f"torch-{importlib.metadata.version('torch')}.dist-info/METADATA"
    )
    (mine / "METADATA").write_text(
        about.read_text(encoding="utf-8").replace(
            f"\nVersion: {importlib.metadata.version('torch')}", "\nVersion: 2.12.1", 1
        ),
        encoding="utf-8",
    )
    rig.mount_over("node3", mine / "METADATA", about)
    launch = "0123456789abcdef"
    ours = {"JP_TRAIN_LAUNCH_ID": launch, "JP_TRAIN_LOGS": f"{folder}/run/stage2/logs/{launch}"}
    dead = rig.popen("node3", ["sleep", "600"], env=ours)

    (mine / "run.yaml").write_text(world.config.read_text() + "seed: 41\n")
    rig.mount_over("node4", mine / "run.yaml", world.config)
    shutil.copytree(folder / "tokenizer", mine / "tokenizer")
    (mine / "tokenizer/tokenizer.json").write_text("Some content")
    rig.mount_over("node4", mine / "tokenizer", folder / "tokenizer")

    shutil.copytree(folder / "data", mine / "data")
    shutil.rmtree(mine / "data/text")
    (mine / "data/digits-und/000000.tar").unlink()
    shutil.rmtree(mine / "data/digits-und")
    write_shard(mine / "data/digits-und", {"a.txt": b"one" * 4000})
    with open(mine / "data/digits-gen/000000.tar", "r+b") as file:
        file.truncate(700)
    rig.mount_over("node5", mine / "data", folder / "data")
    if FAKETIME:
        with open(rig.folder / "node5.sshd_config", "a", encoding="utf-8") as file:
            file.write(f"SetEnv LD_PRELOAD={FAKETIME[0]} FAKETIME=+3600s\n")
        rig.restart_sshd("node5")

    (mine / "run").mkdir()
    rig.mount_over("node6", mine / "run", folder / "run")
    rig.small_disk("node6", Path("/dev/shm"), full=True)
    holder = rig.popen(
        "node1",
        [
            sys.executable,
            "-c",
            f"import socket, time\ns = socket.create_server(('', {PORT}))\nprint(flush=True)\ntime.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline()
    try:
        return world.preflight("--skip", "bandwidth")
    finally:
        for process in (dead, holder):
            process.kill()
            process.wait()
        if FAKETIME:
            config = rig.folder / "node5.sshd_config"
            config.write_text(
                "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("SetEnv"))
            )
            rig.restart_sshd("node5")
        world.heal()


@pytest.mark.parametrize(
    ("host", "check", "message", "remedy"),
    [
        ("node1", "port", f"master port {PORT}: Address already in use; it is held by pid", "--master-port"),
        ("node2", "code", "data/packing.py", "the same commit"),
        ("node2", "locks", "fused_adam/lock is 120 min old", "rm "),
        ("node3", "versions", "torch 2.12.1", "pip install torch=="),
        ("node3", "jobs", "1 process of launch 0123456789abcdef in ", "ssh node3 kill -9 "),
        ("node4", "config", "seed: 41", "copy the launch YAML"),
        ("node4", "data", "tokenizer.path: names, sizes or contents", "on node4"),
        ("node5", "data", "source text: ", "mount or copy the data on node5"),
        ("node5", "data", "also source digits-gen", "mount or copy the data on node5"),
        ("node5", "data", "source digits-und: names, sizes or contents", "on node5"),
        ("node6", "shared", "a file that node1 wrote into", "mount the same folder on node6"),
        ("node6", "disk", "No space left on device: shared memory (/dev/shm)", "--shm-size"),
    ],
)  # fmt: skip
def test_a_host_that_differs_is_named_with_what_differs_and_what_to_do(
    unlike: Outcome, host: str, check: str, message: str, remedy: str
) -> None:
    unlike.require(host, check, message, remedy)


@pytest.mark.skipif(
    not FAKETIME,
    reason="not installed: libfaketime (Debian: apt-get install libfaketime); "
    "no namespace has a real-time clock of its own",
)
def test_a_host_with_another_time_is_named(unlike: Outcome) -> None:
    unlike.require("node5", "clock", "s ahead of the others'", "time synchronisation on node5")
    assert len([fault for fault in unlike.report["faults"] if fault["check"] == "clock"]) == 1


def test_hosts_without_a_planted_fault_get_none(unlike: Outcome) -> None:
    assert unlike.returncode == 5 and unlike.left == {} and unlike.seconds <= REPORTED_IN_S
    planted = {
        ("node1", "port"), ("node2", "code"), ("node2", "locks"), ("node3", "versions"), ("node3", "jobs"),
        ("node4", "config"), ("node4", "data"),
        ("node5", "data"), ("node5", "clock"), ("node6", "shared"), ("node6", "disk"),
    }  # fmt: skip
    assert {(fault["host"], fault["check"]) for fault in unlike.report["faults"]} - planted == set()


# -- networks and disks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocked(world: World, unlike: Outcome) -> Outcome:
    """node2 and node3 are cut off from each other, node4 from all (but for ssh), node5's name is a loopback address,
    node6 has a GPU too few."""
    rig, folder = world.rig, world.folder
    mine = folder / "blocked"
    mine.mkdir()
    world.firewall("node2", "ip saddr 10.77.0.3 tcp dport != 22 drop")
    world.firewall("node4", "tcp dport != 22 drop")
    (mine / "hosts").write_text("".join(f"10.77.0.{i} node{i}\n" for i in range(1, 5)) + "127.0.1.1 node5\n")
    rig.mount_over("node5", mine / "hosts", Path("/etc/hosts"))
    rig.mount_over("node5", folder / "run", folder / "run", read_only=True)
    devices = mine / "dev"
    (devices / "shm").mkdir(parents=True)
    for name, major, minor in (
        ("null", 1, 3),
        ("zero", 1, 5),
        ("urandom", 1, 9),
        ("nvidia0", 195, 0),
        ("nvidiactl", 195, 255),
    ):
        os.mknod(devices / name, 0o666 | 0o020000, os.makedev(major, minor))
    rig.mount_over("node6", devices, Path("/dev"))
    rig.small_disk("node6", folder / "run", full=True)
    hostfile = world.hostfile.read_text()
    world.hostfile.write_text(hostfile.replace("node6 slots=1", "node6 slots=2"))
    try:
        return world.preflight("--skip", "data")
    finally:
        world.hostfile.write_text(hostfile)
        world.heal()


@pytest.mark.parametrize(
    ("host", "check", "message", "remedy"),
    [
        ("node2", "reach", "node2 and node3 do not reach each other: no answer from 10.77.0.3",
         "between node2 and node3"),
        ("node4", "reach", "no other host reaches it", "open the fabric of node4"),
        ("node4", "port", "does not reach the rendezvous on node1", f"open port {PORT} of node1 for node4"),
        ("node5", "reach",
         "ranks would use 127.0.1.1, which no other host reaches: the host's own name 'node5' resolves to it",
         "GLOO_SOCKET_IFNAME"),
        ("node5", "disk", "Read-only file system: run folder", "remount,rw"),
        ("node6", "disk", "No space left on device: run folder", "free space at"),
        ("node6", "devices", "2 slots in the hostfile, but 1 GPU device files", "slots=1"),
        ("node6", "devices", "can use 0 of 1 GPUs", "a torch build that fits the driver"),
        ("node3", "devices", "no GPU device file in /dev, while host node6 has GPUs", "--exclude node3"),
    ],
)  # fmt: skip
def test_a_host_that_is_cut_off_or_lacks_room_or_devices_is_named(
    blocked: Outcome, host: str, check: str, message: str, remedy: str
) -> None:
    blocked.require(host, check, message, remedy)


def test_no_all_reduce_is_tried_over_hosts_that_cannot_meet(blocked: Outcome) -> None:
    assert "no all-reduce was made: not all hosts reach each other" in blocked.report["notes"]
    assert blocked.returncode == 5 and blocked.left == {} and blocked.seconds <= REPORTED_IN_S


# -- slow and hung ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limping(world: World, blocked: Outcome) -> Outcome:
    """node3 has a slow link, the probe on node4 is stopped as soon as it runs, node5 has a broken torch, node6 no
    Python where node1 has it."""
    empty = world.folder / "empty"
    empty.mkdir()
    world.rig.mount_over("node5", empty, Path(str(importlib.metadata.distribution("torch").locate_file("torch"))))
    world.rig.mount_over("node6", empty, Path(sys.prefix))
    world.rig.slow("node3", rate="20mbit")

    def stop_the_probe() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for pid, line in world.rig.processes("node4"):
                if line.startswith(sys.executable) and "jp_train.cluster.probe" in line:
                    os.kill(pid, signal.SIGSTOP)
                    return
            time.sleep(0.01)
        raise AssertionError("no probe came to node4")

    try:
        return world.preflight("--timeout", f"{min(60, 8 * slowness()):.0f}", meanwhile=stop_the_probe)
    finally:
        world.heal()


def test_a_slow_link_is_named_by_its_host(limping: Outcome) -> None:
    limping.require("node3", "bandwidth", "slow: sends at", "look at the link of node3")
    assert [fault["host"] for fault in limping.report["faults"] if fault["check"] == "bandwidth"] == ["node3"]


def test_a_hung_host_is_named_and_its_process_does_not_stay(limping: Outcome) -> None:
    limping.require("node4", "answer", "no answer within", "log in to node4")
    assert limping.left == {} and limping.seconds <= REPORTED_IN_S


@pytest.mark.parametrize(
    ("host", "check", "message", "remedy"),
    [
        ("node5", "versions", "torch cannot be loaded", "install the torch that the others have"),
        ("node6", "code", "No such file or directory", f"node6 needs {sys.executable}"),
    ],
)
def test_a_host_without_a_working_environment_is_named(
    limping: Outcome, host: str, check: str, message: str, remedy: str
) -> None:
    limping.require(host, check, message, remedy)


def test_an_interrupted_preflight_leaves_nothing(world: World, limping: Outcome) -> None:
    argv = [
        sys.executable,
        "-m",
        "jp_train",
        "preflight",
        "--hostfile",
        str(world.hostfile),
        "--include",
        "node1@node2",
    ]
    process = world.rig.popen("node1", argv, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while (
        not any("jp_train.cluster.probe" in line for _, line in world.rig.processes("node2"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    pids = [pid for pid, line in world.rig.processes("node1") if "jp_train preflight" in line]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert world.rig.wait_until_empty() == {}

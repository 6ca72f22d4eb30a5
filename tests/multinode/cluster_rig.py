"""Two to four "hosts" on this machine: real sshd, pdsh and gloo over a bridge, and the faults that a cluster has.

A host is a set of namespaces (network, host name, processes, mounts, shared memory) whose process 1 is an sshd; a
further network namespace holds the bridge. The namespaces have no names and the interfaces are made inside them, so the
machine itself is not touched: no address, no /etc/netns, no ~/.ssh. They end with the process that made them, however
that ends (PR_SET_PDEATHSIG and `unshare --kill-child`). The file system is the machine's own, as the run folder of a
cluster is shared; /run and /dev/shm are each host's own, and `small_disk` and `mount_over` give one host another view
of a path.

    with Cluster(tmp_path, hosts=2) as cluster:
        done = cluster.run("node1", [sys.executable, "-m", "jp_train", "launch", ..., "--hostfile",
        str(cluster.hostfile)], timeout=60) process = cluster.popen("node1", ["sleep", "100"]) cluster.send(process,
        signal.SIGTERM) cluster.link("node2", "down") assert cluster.processes("node2") == []
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
OWNER = "JP_TRAIN_RIG_OWNER"
"""In the environment of every process of a rig: `PID:START` of the process that made it."""
PR_SET_PDEATHSIG = 1
READY_S = 20.0

SSH_CONFIG = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  UpdateHostKeys no
  LogLevel ERROR
"""
SSHD_CONFIG = """Port {port}
ListenAddress {address}
ListenAddress {ipv6}
HostKey {folder}/{name}.host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 200
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
INIT = """
mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount -t tmpfs tmpfs /dev/shm || exit 1
mount --bind {folder}/hosts /etc/hosts && mount --bind {folder}/ssh_config /etc/ssh/ssh_config || exit 1
hostname {name} && read start && exec /usr/sbin/sshd -D -E {folder}/{name}.sshd.log -f {folder}/{name}.sshd_config
"""


def missing_parts() -> str:
    """What this machine lacks for a rig, in words; empty when it has everything."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install iproute2 openssh-server pdsh)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    unshare = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--mount-proc"]
    probe = [*unshare, "ip", "link", "add", "v", "type", "veth", "peer", "name", "w"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Node:
    """One host: `shell` is the unshare process, `init` process 1 of the namespaces, both as process ids of this
    machine."""

    name: str
    address: str
    shell: subprocess.Popen[bytes]
    init: int
    port: str
    """The end of its cable on the bridge."""
    mounts: list[str] = field(default_factory=list)

    @property
    def up(self) -> bool:
        return self.shell.poll() is None


class Cluster:
    """`hosts` machines called node1, node2, ... on 10.77.0.0/24 and fd77::/64. A context; everything ends with it.

    `folder`: for keys, logs and the hostfile. `slots`: ranks a host in `hostfile`. `port`: of every sshd.
    """

    def __init__(self, folder: Path, *, hosts: int = 2, slots: int = 1, port: int = 22) -> None:
        self.folder = folder / f"rig_{os.getpid()}_{id(self):x}"
        self.names = [f"node{number}" for number in range(1, hosts + 1)]
        self.nodes: dict[str, Node] = {}
        self.hostfile = self.folder / "hostfile"
        self._slots, self._port = slots, port
        self._switch: subprocess.Popen[bytes] | None = None
        self._owner = f"{os.getpid()}:{_started(os.getpid())}"
        self._open: list[subprocess.Popen[Any]] = []
        self._log: IO[str] | None = None

    def __enter__(self) -> Cluster:
        end_orphans()
        try:
            self.folder.mkdir(parents=True)
            self._log = (self.folder / "rig.log").open("w")
            self._write_files()
            self._switch = self._unshare(
                ["--net"], "ip link add br0 type bridge && ip link set br0 up && echo up && exec sleep infinity"
            )
            assert self._switch.stdout is not None and self._switch.stdout.readline() == b"up\n", (
                "the bridge could not be made"
            )
            for name in self.names:
                self.start_host(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- using it ----------------------------------------------------------------------------------

    def popen(
        self, host: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start `argv` on a host, with this process's environment and `env`, in a process group of its own;
        `options` go to Popen."""
        node = self.nodes[host]
        options.setdefault("text", True)
        process = subprocess.Popen(
            [*self._enter(node), f"--wd={options.pop('cwd', os.getcwd())}", "--", *argv],
            env={**os.environ, **(env or {}), OWNER: self._owner}, start_new_session=True, **options,
        )  # fmt: skip
        self._open.append(process)
        return process

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` on a host and return its code and output. Raises TimeoutExpired after having killed its process
        group."""
        process = self.popen(host, argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            out, err = process.communicate()
            raise subprocess.TimeoutExpired(list(argv), timeout, out, err) from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def send(self, process: subprocess.Popen[Any], number: int) -> None:
        """Signal what `popen` started (its own process is the one that entered the host)."""
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), number)

    def processes(self, host: str) -> list[tuple[int, str]]:
        """What runs on a host but its sshd: (process id of this machine, command line). A host that is off has none;
        zombies do not count."""
        node = self.nodes[host]
        if not node.up:
            return []
        space = os.readlink(f"/proc/{node.init}/ns/pid")
        processes = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == node.init:
                continue
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") != space:
                    continue
                line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if line and not line.startswith(("sshd:", "/usr/sbin/sshd")):  # a zombie has no command line
                processes.append((int(entry), line))
        return sorted(processes)

    def wait_until_empty(self, timeout: float = 5.0) -> dict[str, list[tuple[int, str]]]:
        """Wait until no host runs anything, and return what is left: {} when nothing is."""
        deadline = time.monotonic() + timeout
        while (
            left := {name: processes for name in self.names if (processes := self.processes(name))}
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    # -- faults ------------------------------------------------------------------------------------

    def link(self, host: str, state: str) -> None:
        """Pull the cable of a host (`down`: packets are lost without a word) or plug it in (`up`)."""
        assert state in ("up", "down")
        self._in_switch("ip", "link", "set", self.nodes[host].port, state)

    def slow(self, host: str, *, rate: str = "1mbit", delay_ms: int = 0) -> None:
        """Limit what a host sends and receives to `rate` (tc's units). `delay_ms` needs netem in the kernel, and
        fails where it is not."""
        limit = ["tbf", "rate", rate, "burst", "16kbit", "latency", "500ms"]
        qdisc = ["netem", "delay", f"{delay_ms}ms", "rate", rate] if delay_ms else limit
        self._in_switch("tc", "qdisc", "replace", "dev", self.nodes[host].port, "root", *qdisc)
        _checked([*self._enter(self.nodes[host]), "--", "tc", "qdisc", "replace", "dev", "eth0", "root", *qdisc])

    def full_speed(self, host: str) -> None:
        """Undo `slow`."""
        self._in_switch("tc", "qdisc", "del", "dev", self.nodes[host].port, "root")
        _checked([*self._enter(self.nodes[host]), "--", "tc", "qdisc", "del", "dev", "eth0", "root"])

    def stop_host(self, host: str) -> None:
        """Power off: the cable goes dead first, so that no connection is closed, then every process of the host is
        gone."""
        node = self.nodes[host]
        if node.up:
            self.link(host, "down")
            _kill(node.init)
            for process in self._open:  # one that was stopped with what it had entered would not see it end
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)
            node.shell.wait(10)

    def start_host(self, host: str) -> None:
        """Power on a host that is off; what was mounted on it is gone."""
        number = self.names.index(host) + 1
        address, port = f"10.77.0.{number}", f"v{number}"
        shell = self._unshare(
            ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"],
            INIT.format(folder=shlex.quote(str(self.folder)), name=host),
        )
        node = self.nodes[host] = Node(host, address, shell, _only_child(shell), port)
        subprocess.run(
            ["nsenter", "-t", str(self._switch_pid), "--net", "ip", "link", "del", port],
            check=False,
            capture_output=True,
        )
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.init))
        self._in_switch("ip", "link", "set", port, "master", "br0", "up")
        enter = ["nsenter", "-t", str(node.init), "--net"]
        _checked(
            [*enter, "ip", "link", "set", "eth0", "address", f"02:00:0a:4d:00:{number:02x}"]
        )  # the others remember it over a power cycle
        _checked([*enter, "ip", "addr", "add", f"{address}/24", "dev", "eth0"])
        _checked([*enter, "ip", "addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad"])
        for device in ("lo", "eth0"):
            _checked([*enter, "ip", "link", "set", device, "up"])
        assert shell.stdin is not None
        shell.stdin.write(b"\n")
        shell.stdin.close()
        self._wait_for_sshd(node)

    def change_host_key(self, host: str) -> None:
        """The host answers with another key than the one that all know."""
        self._host_key(host)
        self.restart_sshd(host)

    def restart_sshd(self, host: str) -> None:
        """The host's ssh server starts again, with its present configuration and key; open connections stay."""
        log = self.folder / f"{host}.sshd.log"
        already = log.read_text().count("Server listening")
        os.kill(self.nodes[host].init, signal.SIGHUP)
        deadline = time.monotonic() + READY_S
        while log.read_text().count("Server listening") == already:
            assert time.monotonic() < deadline, f"sshd of {host} did not start again"
            time.sleep(0.05)

    def trust_host_keys(self) -> None:
        """All hosts know all present host keys (again)."""
        keys = {name: (self.folder / f"{name}.host_key.pub").read_text() for name in self.names}
        lines = []
        for number, name in enumerate(self.names, 1):
            known = [name, f"10.77.0.{number}", f"fd77::{number}"]
            known = known if self._port == 22 else [f"[{each}]:{self._port}" for each in known]
            lines.append(f"{','.join(known)} {keys[name]}")
        (self.folder / "known_hosts").write_text("".join(lines))

    def small_disk(self, host: str, path: Path, *, size: str = "1m", full: bool = False) -> None:
        """On this host alone `path` (an existing folder) is a disk of its own of `size`, and `full` to the last byte
        if asked."""
        enter = self._enter(self.nodes[host])
        _checked([*enter, "--", "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)])
        self.nodes[host].mounts.append(str(path))
        if full:
            subprocess.run(
                [*enter, "--", "dd", "if=/dev/zero", f"of={path}/ballast", "bs=4096"], check=False, capture_output=True
            )

    def mount_over(self, host: str, source: Path, path: Path, *, read_only: bool = False) -> None:
        """On this host alone `path` shows what `source` is (folder or file): other code, other data, a read-only
        disk."""
        enter = [*self._enter(self.nodes[host]), "--"]
        if not read_only:
            _checked([*enter, "mount", "--bind", str(source), str(path)])
        else:  # made read-only elsewhere: in its place it would be busy as soon as something is written there
            aside = "/run/aside"
            _checked([*enter, "mkdir", "-p", aside])
            _checked([*enter, "mount", "--bind", str(source), aside])
            _checked([*enter, "mount", "-o", "remount,bind,ro", aside])
            _checked([*enter, "mount", "--move", aside, str(path)])
        self.nodes[host].mounts.append(str(path))

    def unmount(self, host: str, path: Path) -> None:
        """Undo the last `small_disk` or `mount_over` of this path."""
        _checked([*self._enter(self.nodes[host]), "--", "umount", "--lazy", str(path)])
        self.nodes[host].mounts.remove(str(path))

    def repair(self) -> None:
        """Every host up, connected, at full speed, trusted, with the machine's own file system and no processes:
        ready for the next test."""
        for name in self.names:
            node = self.nodes[name]
            if not node.up:
                self.start_host(name)
                continue
            self.link(name, "up")
            for pid, _ in self.processes(name):
                _kill(pid)
            subprocess.run(
                [*self._enter(node), "--", "tc", "qdisc", "del", "dev", "eth0", "root"],
                check=False,
                capture_output=True,
            )
            subprocess.run(
                ["nsenter", "-t", str(self._switch_pid), "--net", "tc", "qdisc", "del", "dev", node.port, "root"],
                check=False,
                capture_output=True,
            )
            for path in list(reversed(node.mounts)):
                self.unmount(name, Path(path))
        self.trust_host_keys()

    def close(self) -> None:
        """End every host and the bridge. Safe to call twice."""
        for node in self.nodes.values():
            _kill(node.init)
        for process in (*self._open, *(node.shell for node in self.nodes.values()), self._switch):
            if process is None:
                continue
            _kill_group(process)
            process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if self._log is not None:
            self._log.close()

    # -- making it ---------------------------------------------------------------------------------

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {name}\n" for i, name in enumerate(self.names, 1))
        )
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")])
        for number, name in enumerate(self.names, 1):
            self._host_key(name)
            (folder / f"{name}.sshd_config").write_text(
                SSHD_CONFIG.format(
                    port=self._port, address=f"10.77.0.{number}", ipv6=f"fd77::{number}", folder=folder, name=name
                )
            )
        self.trust_host_keys()
        self.hostfile.write_text("".join(f"{name} slots={self._slots}\n" for name in self.names))

    def _host_key(self, host: str) -> None:
        path = self.folder / f"{host}.host_key"
        for old in (path, path.with_name(f"{path.name}.pub")):
            old.unlink(missing_ok=True)
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)])

    def _unshare(self, spaces: Sequence[str], script: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,
            env={**os.environ, OWNER: self._owner}, preexec_fn=_end_with_parent,
        )  # fmt: skip

    def _enter(self, node: Node) -> list[str]:
        return ["nsenter", "-t", str(node.init), "--net", "--uts", "--ipc", "--pid", "--mount"]

    @property
    def _switch_pid(self) -> int:
        assert self._switch is not None
        return self._switch.pid

    def _in_switch(self, *argv: str) -> None:
        _checked(["nsenter", "-t", str(self._switch_pid), "--net", *argv])

    def _wait_for_sshd(self, node: Node) -> None:
        deadline = time.monotonic() + READY_S
        port = f"{self._port:04X}"
        while not any(
            line.split()[1].endswith(f":{port}") and line.split()[3] == "0A"
            for line in Path(f"/proc/{node.init}/net/tcp").read_text().splitlines()[1:]
        ):
            assert node.up and time.monotonic() < deadline, (
                f"sshd of {node.name} did not start; see {self.folder}/{node.name}.sshd.log"
            )
            time.sleep(0.02)


def end_orphans() -> list[int]:
    """End what a rig left whose maker is gone. (The kernel ends it with its maker; this is for one that moved its
    children away.)"""
    ended = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        owner = next(
            (item.partition(b"=")[2].decode() for item in environment if item.startswith(f"{OWNER}=".encode())), ""
        )
        if owner:
            pid, _, started = owner.partition(":")
            if _started(int(pid)) != started:
                _kill(int(entry))
                ended.append(int(entry))
    return ended


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot: with its id it names one process for good. Empty for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _only_child(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + READY_S
    while True:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        assert process.poll() is None and time.monotonic() < deadline, "unshare did not start"
        time.sleep(0.01)


def _checked(argv: Sequence[str]) -> None:
    done = subprocess.run(list(argv), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{shlex.join(argv)} failed with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """End a process that was started in a group of its own, and what it started in that group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A port that is free on this machine; a host's ports are its own, so that any would do there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":  # a rig to play with: `python tests/multinode/cluster_rig.py FOLDER`, ends with its input
    with Cluster(Path(sys.argv[1]), hosts=3) as rig:
        print(
            "\n".join(
                f"{node.name} {node.address}: {shlex.join(rig._enter(node))} -- bash" for node in rig.nodes.values()
            ),
            flush=True,
        )
        sys.stdin.read()

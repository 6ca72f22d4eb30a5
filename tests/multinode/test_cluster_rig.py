"""The rig of the multi-host tests itself: its hosts are apart, its faults are faults, and nothing of it outlives its
maker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multinode.cluster_rig import OWNER, Cluster
from tests.multinode.host_faults import build_clock, give_clock, lose_packets, set_clock


def owned_by(pid: int) -> list[str]:
    """Live processes that the maker `pid` of a rig has started."""
    commands = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and f"{OWNER}={pid}:".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                commands.append(Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return commands


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_hosts_reach_each_other_by_ssh_and_a_fault_of_a_host_stays_there(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(hosts=2)
    ask = ["ssh", "-o", "ConnectTimeout=1", "node2", "hostname"]
    assert cluster.run("node1", ask).stdout == "node2\n"
    cluster.link("node2", "down")
    assert "timed out" in cluster.run("node1", ask).stderr
    cluster.link("node2", "up")
    cluster.change_host_key("node2")
    assert "Host key verification failed" in cluster.run("node1", ask).stderr
    cluster.small_disk("node2", tmp_path, full=True)
    assert "No space left" in cluster.run("node2", ["sh", "-c", f"head -c 9999 /dev/zero > {tmp_path}/file"]).stderr
    assert list(tmp_path.iterdir()) == []
    process = cluster.popen("node2", ["sleep", "1000"])
    deadline = time.monotonic() + 30.0
    while [line for _, line in cluster.processes("node2")] != ["sleep 1000"]:  # nsenter, until it has become sleep
        assert time.monotonic() < deadline, cluster.processes("node2")
        time.sleep(0.01)
    assert cluster.processes("node1") == []
    cluster.stop_host("node2")
    assert process.wait(10) != 0 and cluster.processes("node2") == []
    cluster.repair()
    assert cluster.run("node1", ask).stdout == "node2\n" and cluster.wait_until_empty() == {}


def test_packets_get_lost_and_the_clock_jumps_on_one_host_while_programs_run(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(hosts=2)
    if not shutil.which("nft"):
        pytest.skip("not installed: nft (Debian: apt-get install nftables)")
    lose_packets(cluster, "node2", 99)
    ask = ["ssh", "-o", "ConnectTimeout=1", "node2", "true"]
    assert "timed out" in cluster.run("node1", ask).stderr
    lose_packets(cluster, "node2", 0)
    assert cluster.run("node1", ask).returncode == 0

    library = build_clock(tmp_path)
    if library is None:
        pytest.skip("no C compiler")
    give_clock(cluster, "node2", library)
    program = "import time\nwhile input(): print(time.time(), time.monotonic(), time.sleep(0.01), flush=True)"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = cluster.popen("node1", ["ssh", "node2", f"{sys.executable} -c '{program}'"], **options)

    def times() -> tuple[float, float]:
        process.stdin.write("now\n")
        process.stdin.flush()
        wall, monotonic, _ = process.stdout.readline().split()
        return float(wall), float(monotonic)

    before = times()
    for ahead_s in (3600.0, -86400.0, 0.0):
        set_clock(cluster, "node2", ahead_s)
        now = times()
        elapsed = now[1] - before[1]
        assert now[0] - before[0] == pytest.approx(ahead_s + elapsed, abs=0.5) and elapsed < 30
    process.communicate("\n", timeout=30)


def test_nothing_of_a_rig_outlives_a_maker_that_was_killed(rig_parts: None, tmp_path: Path) -> None:
    maker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("cluster_rig.py")), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert maker.stdout is not None
    inits = [int(re.search(r"-t (\d+)", maker.stdout.readline().decode())[1]) for _ in range(3)]
    # their keepers, and the bridge
    assert all(Path(f"/proc/{pid}/cmdline").read_text() for pid in inits) and len(owned_by(maker.pid)) >= 4
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    deadline = time.monotonic() + 20
    while left := owned_by(maker.pid) + [pid for pid in inits if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)

"""The rig of several hosts on one machine; its tests are skipped only where the machine lacks what it needs, and say
what."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.multinode.cluster_rig import Cluster, missing_parts

SLURM_PROGRAMS = ("slurmctld", "slurmd", "srun", "salloc", "sinfo")
SLURM = """ClusterName=rig
SlurmctldHost=node1
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
NodeName=node[1-2] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def rig_parts() -> None:
    """Skips, with the reason, where no rig can be made."""
    missing = missing_parts()
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="module")
def make_cluster(rig_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """`make_cluster(hosts=3, slots=1)` gives a running Cluster that ends with the module."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Cluster(tmp_path_factory.mktemp("rig"), **options))


@pytest.fixture(scope="module")
def slurm(make_cluster: Callable[..., Cluster]) -> tuple[Cluster, dict[str, str]]:
    """Two hosts under Slurm, and the environment that knows it."""
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client)")
    cluster = make_cluster(hosts=2)
    folder = cluster.folder / "slurm"
    for name in ("state", "spool_node1", "spool_node2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(SLURM.format(folder=folder))
    env = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster.popen("node1", ["slurmctld", "-D", "-i"], env=env, **quiet)
    for host in cluster.names:
        cluster.popen(host, ["slurmd", "-D", "-N", host], env=env, **quiet)
    deadline = time.monotonic() + 60
    while cluster.run("node1", ["sinfo", "-h", "-o", "%n %T"], env=env).stdout.count("idle") < 2:
        assert time.monotonic() < deadline, (folder / "ctld.log").read_text()[-3000:]
        time.sleep(0.2)
    return cluster, env

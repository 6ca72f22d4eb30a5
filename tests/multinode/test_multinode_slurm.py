"""`jp-train launch --launcher slurm` in an allocation of a real Slurm: slurmctld and slurmd on two hosts of the rig,
srun, a stop signal that saves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.multinode.cluster_rig import Cluster

ROOT = Path(__file__).resolve().parents[2]

from jp_train.config import save_config  # noqa: E402
from tests.engine.tiny_run import tiny_run, write_data  # noqa: E402


def test_srun_starts_the_ranks_and_a_stop_signal_to_the_launch_saves_on_all_hosts(
    slurm: tuple[Cluster, dict[str, str]], tmp_path: Path
) -> None:
    cluster, env = slurm
    cfg = tiny_run(write_data(tmp_path / "data"), tmp_path / "run", stage=2, steps=400, rows=4)
    save_config(cfg, tmp_path / "run.yaml")
    words = [
        "launch",
        str(tmp_path / "run.yaml"),
        "--hostfile",
        str(cluster.hostfile),
        "--launcher",
        "slurm",
        "--skip-preflight",
    ]
    metrics, terminal = tmp_path / "run" / "metrics.jsonl", tmp_path / "terminal"
    with terminal.open("w") as file:
        job = cluster.popen(
            "node1",
            ["salloc", "-N2", "--exclusive", sys.executable, "-m", "jp_train", *words],
            env=env,
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert job.poll() is None and time.monotonic() < deadline, terminal.read_text()[-4000:]
        time.sleep(0.1)
    (launch,) = [
        pid for pid, line in cluster.processes("node1") if line.startswith(f"{sys.executable} -m jp_train launch")
    ]
    os.kill(launch, signal.SIGTERM)
    assert job.wait(120) == 143, terminal.read_text()[-4000:]
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())
    assert manifest["dp_world_size"] == 2
    deadline = time.monotonic() + 30
    while left := [
        line
        for host in cluster.names
        for _, line in cluster.processes(host)
        if "jp_train" in line and "slurm" not in line.split()[0]
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    records = sorted(path.name for path in (tmp_path / "run" / "logs").glob("*/*.log"))
    assert records == ["launcher.log", "node1_rank0.log", "node2_rank1.log"]

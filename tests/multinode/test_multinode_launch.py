"""`jp-train launch` over real ssh, pdsh (or mpirun) and gloo on several hosts, with hosts that die on the way: the
stage-2 model at its smallest, real ZeRO-3."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.multinode.cluster_rig import Cluster

ROOT = Path(__file__).resolve().parents[2]

from jp_train.config import save_config  # noqa: E402
from tests.engine.tiny_run import tiny_run, write_data  # noqa: E402

STEPS = 12
JP_TRAIN = [sys.executable, "-m", "jp_train"]
ENV = {
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # ranks of many hosts import the same files
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps of four rows that saves every second step and takes a silent rank for stalled after 20
    s."""
    folder = tmp_path_factory.mktemp("world")
    cfg = tiny_run(write_data(folder / "data"), folder / "run", stage=2, steps=STEPS, rows=4)
    cfg.checkpoint.every_steps = 2
    cfg.checkpoint.export_at_end = False
    cfg.engine.stall_timeout_s = 20.0
    save_config(cfg, folder / "run.yaml")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def alone(config: Path) -> Run:
    """The same run in one process, on this machine. It is read last, and trains while the launches wait for hosts
    that are gone."""
    run_dir = config.parent / "alone"
    process = subprocess.Popen(
        [*JP_TRAIN, "train", str(config), f"run_dir={run_dir}"], env={**os.environ, **ENV, "GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    run = Run(run_dir, process)
    yield run
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(hosts=4)


@dataclass
class Run:
    """A run folder, and the process that trains in it."""

    folder: Path
    process: subprocess.Popen[Any]

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["event"] == name]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl") if "loss/total" in line), default=0)

    @property
    def saved(self) -> int:
        """The step of the newest complete checkpoint."""
        return max((int(path.name.removeprefix("step_")) for path in self.folder.glob("checkpoints/step_*")), default=0)

    @property
    def steps(self) -> dict[int, tuple[int, float]]:
        """Digest of the rows and loss of each step; of one that was trained again, the last."""
        return {
            line["step"]: (line["data/rows_digest"], line["loss/total"])
            for line in self.lines("metrics.jsonl")
            if "loss/total" in line
        }

    @property
    def terminal(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.terminal").read_text()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the launch ended with {self.process.poll()}:\n{self.terminal[-6000:]}"
            assert time.monotonic() < deadline, f"it did not get there in time:\n{self.terminal[-6000:]}"
            time.sleep(0.05)

    def same_as(self, other: Run) -> None:
        """The same rows at every step, and the same losses but for the order of sums."""
        mine, theirs = self.steps, other.steps
        assert {step: digest for step, (digest, _) in mine.items()} == {step: theirs[step][0] for step in mine}
        assert [loss for _, loss in mine.values()] == pytest.approx([theirs[step][1] for step in mine], rel=1e-5)


def start(cluster: Cluster, host: str, config: Path, hostfile: Path, *words: str) -> Run:
    folder = config.parent / hostfile.name
    with (config.parent / f"{hostfile.name}.terminal").open("w") as terminal:
        argv = [
            *JP_TRAIN,
            "launch",
            str(config),
            f"run_dir={folder}",
            "--hostfile",
            str(hostfile),
            "--patience",
            "5",
            *words,
        ]
        return Run(folder, cluster.popen(host, argv, env=ENV, cwd=ROOT, stdout=terminal, stderr=terminal))


def test_a_host_that_is_off_is_named_before_anything_starts(cluster: Cluster, config: Path) -> None:
    cluster.stop_host("node3")
    try:
        run = start(cluster, "node1", config, cluster.hostfile)
        assert run.process.wait(120) == 5
        assert "node3" in run.terminal.splitlines()[-1] and "Nothing was started" in run.terminal
        assert not (run.folder / "logs").exists()
        assert cluster.wait_until_empty() == {}
    finally:
        cluster.start_host("node3")


def test_four_hosts_train_the_rows_of_a_single_host_and_two_go_on_when_the_others_die(
    cluster: Cluster, config: Path, request: Any
) -> None:
    hostfile = cluster.folder / "four"
    shutil.copy(cluster.hostfile, hostfile)
    run = start(cluster, "node4", config, hostfile, "--max-restarts", "1", "--skip-preflight")
    run.wait_for(lambda: run.step >= 3 and run.saved >= 2)
    cluster.stop_host("node1")  # rank 0's host loses its power
    cluster.link("node2", "down")  # and another one its cable: what runs there must end by itself
    alone = request.getfixturevalue("alone")
    assert run.process.wait(400) == 0, run.terminal[-6000:]

    (restart,) = run.events("restart")
    assert (restart["hosts"], restart["left_out"]) == (["node3", "node4"], ["node1", "node2"])
    assert (restart["ranks_before"], restart["ranks"]) == (4, 2)
    assert "host node1 does not answer" in restart["cause"] and "host node2 does not answer" in restart["cause"]
    assert (
        restart["resumes_at_step"] >= 2
        and restart["lost_steps"] == restart["failed_at_step"] - restart["resumes_at_step"]
    )
    (again,) = run.events("restarted")
    assert again["lost_s"] == pytest.approx(restart["lost_steps_s"] + restart["down_s"] + again["start_s"], abs=0.01)
    assert f"time lost in all {again['lost_s']:.1f} s" in run.terminal
    assert [event["event"] for event in run.lines("events.jsonl")].count("resume") == 1

    assert alone.process.wait(300) == 0
    assert list(run.steps) == list(range(1, STEPS + 1))
    run.same_as(alone)
    cluster.link("node2", "up")
    assert cluster.wait_until_empty(90) == {}
    logs = [sorted(path.name for path in folder.glob("*.log")) for folder in sorted((run.folder / "logs").iterdir())]
    assert logs == [
        ["launcher.log", *(f"node{n}_rank{n - 1}.log" for n in (1, 2, 3, 4))],
        ["launcher.log", "node3_rank0.log", "node4_rank1.log"],
    ]
    cluster.start_host("node1")


def children(pid: int) -> list[psutil.Process]:
    """Of a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []


def test_a_killed_rank_is_named_and_the_run_goes_on_until_a_stop_signal_saves_it(
    cluster: Cluster, config: Path, alone: Run
) -> None:
    hostfile = cluster.folder / "two"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    # mpirun starts a rank without DeepSpeed's own launcher; where it is not installed, pdsh does
    launcher = ["--launcher", "openmpi"] if shutil.which("mpirun") else []
    run = start(
        cluster,
        "node1",
        config,
        hostfile,
        "--max-restarts",
        "1",
        "--skip-preflight",
        "stage.training_steps=400",
        *launcher,
    )
    run.wait_for(lambda: run.step >= 3 and run.saved >= 2)
    called = {pid for pid, line in cluster.processes("node2") if "-m jp_train train" in line}
    # a child that the rank has just forked has its command line for a moment
    (rank,) = called - {child.pid for pid in called for child in children(pid)}
    os.kill(rank, signal.SIGKILL)
    run.wait_for(lambda: len(run.events("restarted")) == 1)
    (restart,) = run.events("restart")
    assert "rank 1 on node2" in restart["cause"] and "killed by SIGKILL" in restart["cause"]
    assert restart["hosts"] == ["node1", "node2"] and restart["left_out"] == []

    cluster.send(run.process, signal.SIGTERM)
    assert run.process.wait(120) == 143, run.terminal[-6000:]
    stopped = run.events("stop")[-1]
    assert stopped["exit_code"] == 143 and run.step == stopped["step"]
    assert (run.folder / "checkpoints" / f"step_{stopped['step']:07d}" / "manifest.json").is_file(), (
        "all ranks have saved the last step"
    )
    assert cluster.wait_until_empty() == {}
    common = [step for step in run.steps if step <= STEPS]
    assert [run.steps[step][0] for step in common] == [alone.steps[step][0] for step in common]

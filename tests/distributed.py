"""Starts ranks of real DeepSpeed as processes of their own, with a hard time limit, and collects what they leave.

A rank costs 10-20 s to start (imports), so a launch runs a list of scenarios one after another: `run_ranks(worker, scenarios, ...)` calls
`worker.py FOLDER` on every rank, which reads `scenarios.json` there and writes `NAME.rank0.json`, ... for each. No collective is left to
hang: the ranks' own timeout is shorter than the launch's, and what still runs at its end is killed by process id.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Launch:
    """Exit code (negative for a signal) and stderr of every rank, and the scenarios' results."""

    folder: Path
    codes: list[int]
    errors: list[str]

    def result(self, name: str, rank: int = 0) -> Any:
        """What scenario `name` returned on `rank`; fails with the rank's stderr when it did not get that far."""
        path = self.folder / f"{name}.rank{rank}.json"
        if not path.exists():
            raise AssertionError(f"scenario {name} gave no result on rank {rank}; exit codes {self.codes}; stderr:\n{self.errors[rank][-6000:]}")
        return json.loads(path.read_text())

    def check(self) -> Launch:
        """Fail unless every rank exited with 0."""
        worst = next((rank for rank, code in enumerate(self.codes) if code), None)
        assert worst is None, f"exit codes {self.codes}; stderr of rank {worst}:\n{self.errors[worst][-6000:]}"
        return self


def run_ranks(
    worker: Path,
    folder: Path,
    scenarios: Sequence[dict[str, Any]],
    *,
    world: int,
    timeout_s: float,
    while_running: Callable[[list[subprocess.Popen]], None] | None = None,
    grace_s: float = 30.0,
) -> Launch:
    """Run `scenarios` ([{"name": ..., other arguments}]) on `world` gloo ranks.

    `while_running` may look at files and send signals. Once one rank has failed, the others get `grace_s` to notice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(list(scenarios)))
    port = _free_port()
    processes, files = [], []
    try:
        for rank in range(world):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "PYTHONWARNINGS": "ignore",
            }
            file = (folder / f"rank{rank}.log").open("wb")
            files.append(file)
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(worker), str(folder)], env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
                )
            )
        if while_running is not None:
            while_running(processes)
        deadline, failed = time.monotonic() + timeout_s, None
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if failed is None and any(process.poll() not in (None, 0) for process in processes):
                failed = time.monotonic()
                deadline = min(deadline, failed + grace_s)
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        for file in files:
            file.close()
    logs = [(folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(world)]
    return Launch(folder, [process.returncode for process in processes], logs)


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen], timeout_s: float = 120.0) -> None:
    """Wait until `condition` holds; fails when a rank ends before it does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the ranks did not get there in time"
        assert all(process.poll() is None for process in processes), "a rank ended early"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

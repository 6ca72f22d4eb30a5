"""Starts ranks of real DeepSpeed as processes of their own, with a hard time limit, and collects what they leave.

A process costs 10 s of imports before it is a rank, so two things are shared. `Nursery` keeps one process that has
imported everything and forks the ranks of each launch; and a launch runs a list of scenarios one after another in the
same ranks. No collective is left to hang: the ranks' own timeout is shorter than the launch's, and what still runs at
its end is killed by process id.

The worker module is a script with `SCENARIOS: dict[str, function]`; a scenario {"name", "kind", other arguments} calls
SCENARIOS[kind](**arguments) on every rank, whose result goes to FOLDER/NAME.rankR.json.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Launch:
    """Exit code (negative for a signal) and output of every rank, and the scenarios' results."""

    folder: Path
    codes: list[int]
    errors: list[str]

    def result(self, name: str, rank: int = 0) -> Any:
        """What scenario `name` returned on `rank`; fails with the rank's output when it did not get that far."""
        path = self.folder / f"{name}.rank{rank}.json"
        if not path.exists():
            raise AssertionError(
                f"scenario {name} gave no result on rank {rank}; exit codes {self.codes}; "
                f"output:\n{self.errors[rank][-6000:]}"
            )
        return json.loads(path.read_text())


class Nursery:
    """One process that imports `worker` once and forks ranks. Use as a context; one launch at a time."""

    def __init__(self, worker: Path) -> None:
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(worker)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, None when there is none in time."""
        try:
            found = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None
        assert found is not None, f"the nursery process ended with {self._process.wait()}"
        return found

    def run(
        self,
        folder: Path,
        scenarios: Sequence[dict[str, Any]],
        *,
        world: int,
        timeout_s: float,
        while_running: Callable[[list[int]], None] | None = None,
        grace_s: float = 30.0,
    ) -> Launch:
        """Run `scenarios` on `world` gloo ranks. `while_running` gets the ranks' process ids: it may watch files and
        send signals.

        Once one rank has failed, the others get `grace_s` to notice.
        """
        folder.mkdir(parents=True, exist_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"folder": str(folder), "world": world, "port": _free_port(), "scenarios": list(scenarios)})
            + "\n"
        )
        self._process.stdin.flush()
        started = self._answer(300.0)
        assert started is not None, "the nursery did not start the ranks"
        pids: list[int] = started["pids"]
        codes: dict[int, int] = {}
        deadline = time.monotonic() + timeout_s
        try:
            if while_running is not None:
                while_running(pids)
            while len(codes) < world and time.monotonic() < deadline:
                ended = self._answer(0.2)
                if ended is not None:
                    if ended["code"] and not any(codes.values()):
                        deadline = min(deadline, time.monotonic() + grace_s)
                    codes[ended["rank"]] = ended["code"]
        finally:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    with contextlib.suppress(ProcessLookupError):  # it has ended, and its code is on the way
                        os.kill(pid, signal.SIGKILL)
            while len(codes) < world:
                ended = self._answer(30.0)
                assert ended is not None, "a killed rank did not end"
                codes[ended["rank"]] = ended["code"]
        logs = [(folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(world)]
        return Launch(folder, [codes[rank] for rank in range(world)], logs)


LATE_IMPORTS = (
    "torch._inductor.compile_fx", "functorch.compile", "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "PIL.PngImagePlugin", "PIL.JpegImagePlugin",
)  # fmt: skip
"""What torch and DeepSpeed import during a first step: 2 s of CPU that every forked rank would spend again."""


def serve(run: Callable[[Path, list[dict[str, Any]]], int]) -> None:
    """The nursery's side: read launches from stdin, fork ranks that call `run(folder, scenarios)`, report how they
    end."""
    # else every loader worker of a rank imports the script again, with DeepSpeed and all
    del sys.modules["__main__"].__file__
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):  # another version: slower, no less right
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    for line in sys.stdin:
        order = json.loads(line)
        ranks = {}
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(run, order, rank)
            ranks[pid] = rank
        answer({"pids": list(ranks)})
        for _ in list(ranks):
            pid, status = os.wait()
            answer({"rank": ranks[pid], "code": os.waitstatus_to_exitcode(status)})


def _be_rank(run: Callable[[Path, list[dict[str, Any]]], int], order: dict[str, Any], rank: int) -> None:
    folder = Path(order["folder"])
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(order["world"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(order["port"]),
    )
    code = 70
    try:
        code = run(folder, order["scenarios"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_scenarios(scenarios: dict[str, Callable[..., Any]], folder: Path, wanted: list[dict[str, Any]]) -> int:
    """On a rank: every wanted scenario in order. One with `exit_with_code` decides the exit code (its result's
    `code` or `exit_code`)."""
    code = 0
    for scenario in wanted:
        name, kind = scenario.pop("name"), scenario.pop("kind")
        decides = scenario.pop("exit_with_code", False)
        began, worked = time.monotonic(), time.process_time()
        result = scenarios[kind](**scenario)
        print(
            f"scenario {name}: {time.monotonic() - began:.1f} s, {time.process_time() - worked:.1f} s of CPU",
            file=sys.stderr,
        )
        (folder / f"{name}.rank{os.environ['RANK']}.json").write_text(json.dumps(result))
        if decides:
            code = result.get("code", result.get("exit_code", 1))
    return code


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the ranks did not get there in time"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

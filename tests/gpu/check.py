"""What a reading of the code cannot show, on one GPU of 80 GB in at most 10 minutes; nothing is downloaded.

    python -m tests.gpu.check [--only NAME...] [--list] [--size tiny|1b]

A line of JSON on stdout for each check: name, ok, measured, expected (of `jp-train forecast` where it has an opinion),
seconds, faults. Each has its own time limit, and one that fails hides no other. A summary on stderr at the end; exit
status 1 if any failed. Without a GPU the same code runs on the CPU with tiny models, and speeds are not judged.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from jp_train.engine.device import uses_gpu
from jp_train.errors import one_of
from tests.gpu import kernels, speed, training
from tests.gpu.findings import Findings
from tests.gpu.scene import Scene

TOTAL_S = 600


@dataclass(frozen=True)
class Check:
    """`limit_s`: seconds after which it fails."""

    run: Callable[[Scene, Findings], None]
    limit_s: int

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def purpose(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


CHECKS = (
    Check(kernels.environment, 10),
    Check(kernels.attention, 25),
    Check(kernels.isolation, 15),
    Check(training.determinism, 25),
    Check(training.cpu_and_device, 50),
    Check(speed.stage_2, 60),
    Check(speed.profile, 45),
    Check(speed.toggles, 110),
    Check(speed.packed_and_padded, 40),
    Check(speed.stage_1, 35),
    Check(speed.stage_3, 45),
    Check(training.save_restore, 25),
    Check(kernels.vq, 25),
    Check(training.nan_step, 15),
    Check(training.sigterm, 60),
)
"""In the order of their worth: where time runs out, the last ones are missing."""


def main(arguments: Sequence[str] | None = None, lines: TextIO = sys.stdout) -> int:
    """The exit status; `lines` takes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks, in the usual order")
    parser.add_argument("--list", action="store_true", help="names, time limits and purposes; nothing runs")
    parser.add_argument("--size", choices=("tiny", "1b"), help="default: 1b on a GPU, tiny on a CPU")
    given = parser.parse_args(arguments)
    names = [check.name for check in CHECKS]
    for name in given.only or ():
        if name not in names:
            parser.error(f"--only {name}: no such check{one_of(name, names)}")
    chosen = [check for check in CHECKS if not given.only or check.name in given.only]
    if given.list:
        for check in chosen:
            print(f"{check.name:<20}{check.limit_s:>4} s  {check.purpose}", file=lines, flush=True)
        return 0
    size = given.size or ("1b" if uses_gpu() else "tiny")
    if size == "1b" and not uses_gpu():
        parser.error("--size 1b needs a GPU of 80 GB; there is none here that torch can use")
    # what cuBLAS needs for a fixed order of its sums; on H100 it is the default
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    faulthandler.dump_traceback_later(TOTAL_S, exit=True)  # a kernel that never ends obeys no signal
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
            return run_checks(chosen, Scene(size, Path(folder)), lines)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_checks(checks: Sequence[Check], scene: Scene, lines: TextIO) -> int:
    """Every check, a line of JSON each; 1 if any failed."""
    results = []
    for check in checks:
        results.append(run_check(check, scene))
        print(json.dumps(results[-1]), file=lines, flush=True)
    failed = [result for result in results if not result["ok"]]
    for result in results:
        mark = "ok" if result["ok"] else "FAILED"
        print(
            f"{result['name']:<20}{mark:<8}{result['seconds']:>6.1f} s  {'; '.join(result['faults'])}", file=sys.stderr
        )
    seconds = sum(result["seconds"] for result in results)
    print(f"{len(results)} checks on {scene.device}, {len(failed)} failed, {seconds:.0f} s", file=sys.stderr)
    return 1 if failed else 0


def run_check(check: Check, scene: Scene) -> dict[str, Any]:
    """The JSON line of one check: also of one that raises, runs out of memory or out of time, or judges nothing."""
    findings, began = Findings(), time.perf_counter()
    with faults_of(findings), time_limit(check.limit_s):
        check.run(scene, findings)
    seconds = round(time.perf_counter() - began, 2)
    if not findings.judged and not findings.faults:
        findings.faults.append("the check judged nothing")
    with faults_of(findings):
        scene.release()
    return {"name": check.name, "ok": not findings.faults, "seconds": seconds, **vars(findings)}


@contextmanager
def faults_of(findings: Findings) -> Iterator[None]:
    """What is raised in the block becomes a fault; its traceback goes to stderr."""
    try:
        yield
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        findings.faults.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the main thread, once it is back in Python."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not between the lines
    raise SystemExit(main(lines=own))

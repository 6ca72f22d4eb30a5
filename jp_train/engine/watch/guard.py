"""Where this rank stands, and what it says when a collective fails.

Under ZeRO-3 a module that runs on one rank and not on another leaves the others in a collective until its timeout. The
guard notes the modules each micro-batch enters (a counter, a running hash and the last names: nothing is read from the
device, nothing is sent), so that (1) the ranks' hashes can be compared with the other numbers at the end of a step, (2)
a collective that fails says at which step, micro-batch and module each rank stood, and (3) the watchdog (`watchdog.py`)
sees a stalled rank and whose sequence differs.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch

from jp_train.errors import JpTrainError

TRAIL = 1024
"""Last modules entered that are kept by name: more than one micro-batch of the 7B model enters."""

WAITING_FOR_DATA = "waiting for data"
INDEXING = "indexing"


class Pace(Enum):
    """How long a phase may go without progress."""

    NORMAL = "normal"
    SLOW = "slow"
    """Start-up, first step, save, validation, export: no module is entered for minutes, and nothing is wrong."""
    FREE = "free"
    """As long as it takes: no other rank waits in a collective (an index of any size, see main_first.py)."""


class SequenceGuard:
    """Forward pre-hooks on every module that owns parameters; `signature` is the hash of the names entered since
    `begin_step`.

    Written by the training thread only; the watchdog's thread reads the attributes as they are. Without a model (before
    there is one) it only knows phases.
    """

    def __init__(self, model: torch.nn.Module | None, rank: int) -> None:
        self.rank = rank
        self.step = -1
        self.first_step = -1
        self.micro_batch = -1
        self.phase = "starting"
        self.pace = Pace.SLOW
        self.last = "no module yet"
        self.entered = 0
        self.signature = 0
        self.progress = 0
        """Grows with every module entered and every phase begun or ended."""
        self.trail: deque[str] = deque(maxlen=TRAIL)
        self.explain: Callable[[], str] = str
        """Called once when a collective fails; the watchdog puts in what the other ranks say about it."""
        for name, module in model.named_modules() if model is not None else ():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._hook(name, zlib.crc32(name.encode())))

    def _hook(self, name: str, number: int) -> Callable[[torch.nn.Module, object], None]:
        def note(_module: torch.nn.Module, _inputs: object) -> None:
            self.last = name
            self.entered += 1
            self.progress += 1
            self.signature = (self.signature * 31 + number) & 0xFFFFFFFF
            self.trail.append(name)

        return note

    def begin_step(self, step: int) -> None:
        """Start `step` (counted from 1); the first one of a process may be slow: kernels are built and memory is
        laid out."""
        if self.first_step < 0:
            self.first_step = step
        self.step, self.micro_batch, self.entered, self.signature = step, -1, 0, 0
        self.trail.clear()
        self.progress += 1

    def enter(self, phase: str, micro_batch: int = -1, pace: Pace = Pace.NORMAL) -> None:
        """Begin a phase; it lasts until the next one."""
        slow_start = pace is Pace.NORMAL and self.step == self.first_step
        self.phase, self.micro_batch, self.pace = phase, micro_batch, Pace.SLOW if slow_start else pace
        self.progress += 1

    @contextmanager
    def watch(self, phase: str, micro_batch: int = -1, pace: Pace = Pace.NORMAL) -> Iterator[None]:
        """Name the phase; a collective that fails inside becomes a JpTrainError that names where this rank was."""
        self.enter(phase, micro_batch, pace)
        try:
            yield
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            cause, effect = self.explain(), f"{self.describe()}: {_first_line(error)}"
            raise JpTrainError(f"{cause}; so {effect}" if cause else f"{effect}. {ADVICE}") from error
        self.enter(f"after {phase}", micro_batch)

    def describe(self) -> str:
        where = f"rank {self.rank} at step {self.step}, {self.phase}"
        if self.micro_batch >= 0:
            where += f", micro-batch {self.micro_batch}"
        return f"a collective failed on {where}, after {self.entered} module calls (last: {self.last})"


ADVICE = (
    "Either another rank ended first (its message is the cause), or the ranks ran different modules: compare the step, "
    "the micro-batch and the last module that each rank names. A slow file system or a very long save needs a larger "
    "engine.collective_timeout_s"
)

_MARKS = (
    "timed out",
    "timeout",
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "received data size",
    "socket",
)


def is_collective_failure(error: BaseException) -> bool:
    """Whether an exception comes from a process group (gloo and NCCL raise plain RuntimeErrors; torch's
    DistBackendError is one)."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(mark in text for mark in _MARKS)


def compare_signatures(signatures: list[int], step: int, explain: Callable[[], str] = str) -> None:
    """Raise JpTrainError naming the ranks whose module sequence of this step differs from rank 0's; `explain` may
    know the module."""
    odd = [rank for rank, signature in enumerate(signatures) if signature != signatures[0]]
    if odd:
        detail = explain()
        raise JpTrainError(
            f"step {step}: rank(s) {', '.join(map(str, odd))} ran another sequence of modules than rank "
            f"0{': ' if detail else ''}{detail}. Under ZeRO-3 that mixes up the collectives: every module must run "
            "once in every micro-batch on every rank, so the model's forward pass may not branch on what a batch holds"
        )


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", line)
    return line.partition(". This is typically caused by")[0][:300]  # gloo's guess is worse than ours

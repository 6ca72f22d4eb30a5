"""What every rank was doing when a collective failed.

Under ZeRO-3 a module that runs on one rank and not on another leaves the others in a collective until its timeout. The guard notes the modules each
micro-batch enters (a counter and a running hash: nothing is read from the device, nothing is sent), so that
(1) the ranks' hashes can be compared with the other numbers at the end of a step, and (2) when a collective does time out, each rank's error says
at which step, micro-batch and module it stood.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jp_train.errors import JpTrainError


class SequenceGuard:
    """Forward pre-hooks on every module that owns parameters; `signature` is the hash of the names entered since `begin_step`."""

    def __init__(self, model: torch.nn.Module, rank: int) -> None:
        self.rank = rank
        self.step = -1
        self.micro_batch = -1
        self.phase = "starting"
        self.last = "no module yet"
        self.entered = 0
        self.signature = 0
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._hook(name, zlib.crc32(name.encode())))

    def _hook(self, name: str, number: int):
        def note(_module: torch.nn.Module, _inputs: object) -> None:
            self.last = name
            self.entered += 1
            self.signature = (self.signature * 31 + number) & 0xFFFFFFFF

        return note

    def begin_step(self, step: int) -> None:
        self.step, self.micro_batch, self.entered, self.signature = step, -1, 0, 0

    @contextmanager
    def watch(self, phase: str, micro_batch: int = -1) -> Iterator[None]:
        """Name the phase; a collective that fails inside becomes a JpTrainError which tells where this rank stood."""
        self.phase, self.micro_batch = phase, micro_batch
        try:
            yield
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            raise JpTrainError(f"{self.describe()}: {_first_line(error)}. {ADVICE}") from error

    def describe(self) -> str:
        where = f"rank {self.rank} at step {self.step}, {self.phase}"
        if self.micro_batch >= 0:
            where += f", micro-batch {self.micro_batch}"
        return f"a collective failed on {where}, after {self.entered} module calls (last: {self.last})"


ADVICE = (
    "Either another rank ended first (its message is the cause), or the ranks ran different modules: compare the step, the micro-batch and the "
    "last module that each rank names. A slow file system or a very long save needs a larger engine.collective_timeout_s"
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
    """Whether an exception comes from a process group (gloo and NCCL raise plain RuntimeErrors; torch's DistBackendError is one)."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(mark in text for mark in _MARKS)


def compare_signatures(signatures: list[int], step: int) -> None:
    """Raise JpTrainError naming the ranks whose module sequence of this step differs from rank 0's."""
    odd = [rank for rank, signature in enumerate(signatures) if signature != signatures[0]]
    if odd:
        raise JpTrainError(
            f"step {step}: rank(s) {', '.join(map(str, odd))} ran another sequence of modules than rank 0. Under ZeRO-3 that mixes up the collectives: "
            "every module must run once in every micro-batch on every rank, so the model's forward pass may not branch on what a batch holds"
        )


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", line)[:300]

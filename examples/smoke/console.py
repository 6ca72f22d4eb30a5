"""Output of a step: all of it goes into a log file, and what a person should read to stderr too."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from jp_train.terminal import duration, folded, terminal_columns

PROGRESS_S = 20.0
"""Seconds between two progress lines of pretraining and of writing shards."""
STEP_INTERVAL_S = 30.0
"""Seconds between two training steps that are shown."""
_ROUTINE = re.compile(
    r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[INFO\]|[^|]*: +\d+%\||index(ing|:) |VQ ids: |trainable: |exporting to "
    r"|command: |logs of the ranks: |\d+ rows a step = |\d+ ranks on |step +\d+/\d+  held out"
)
"""Beginnings of lines that only the log file keeps: DeepSpeed's INFO, progress bars, facts that the run folder has."""
_STEP = re.compile(r"step +(?P<step>\d+)/(?P<total>\d+) +loss .*?ETA (?P<eta>.+?)(?:  |$)")
_DETAILS = re.compile(r"  lr \S+|  norm \S+|  \S+ tok/s")


class LineFilter:
    """Decides what of a step's output the terminal shows: warnings, errors and everything unknown always, training
    steps every `STEP_INTERVAL_S` and shortened.

    `later_s`: seconds that the steps after this one should take; they are added to the stage's own estimate.
    """

    def __init__(self, later_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._later_s, self._clock = later_s, clock
        self._shown: float | None = None

    def __call__(self, line: str) -> str | None:
        """The line to show, or None."""
        line = line.rstrip()
        step = _STEP.match(line)
        if step is None:
            return line if line and not _ROUTINE.match(line) else None
        now = self._clock()
        last = step["step"] == step["total"]
        if self._shown is not None and now - self._shown < STEP_INTERVAL_S and not last:
            return None
        self._shown = now
        short = _DETAILS.sub("", line)
        if step["eta"] == "--":
            return short
        return f"{short}  (all {duration(_seconds(step['eta']) + self._later_s)})"


def _seconds(eta: str) -> float:
    parts = re.findall(r"([\d.]+) (d|h|min|s)", eta)
    return sum(float(number) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[unit] for number, unit in parts)


@contextlib.contextmanager
def recorded(log: Path, show: Callable[[str], str | None]) -> Iterator[None]:
    """What this process and its children write to stdout and stderr meanwhile goes into `log`; the lines that `show`
    returns go to the stderr of before, too.

    The file descriptors are redirected, so that the output of child processes is caught without a process between them
    and this one: signals reach everybody as before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = {number: os.dup(number) for number in (1, 2)}
    read_end, write_end = os.pipe()
    for number in before:
        os.dup2(write_end, number)
    os.close(write_end)
    terminal = os.fdopen(os.dup(before[2]), "w", encoding="utf-8", errors="replace", buffering=1)
    reader = threading.Thread(target=_copy, args=(read_end, log, show, terminal), daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in before.items():
            os.dup2(saved, number)
            os.close(saved)
        reader.join(timeout=5.0)  # a child that outlives the step keeps the pipe open


def _copy(read_end: int, log: Path, show: Callable[[str], str | None], terminal: TextIO) -> None:
    with (
        os.fdopen(read_end, encoding="utf-8", errors="replace") as lines,
        log.open("a", encoding="utf-8") as file,
        terminal,
    ):
        for line in lines:
            file.write(line)
            file.flush()
            text = show(line)
            if text is not None:
                print(folded(text, terminal_columns(terminal)), file=terminal)

"""Progress lines with an estimate of the time left, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Says about every twenty seconds how far a job of ``total`` steps is and when it should end."""

    INTERVAL_S = 20.0

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.shown = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether step ``step`` (from 0) deserves a line: the last one always does."""
        return step + 1 == self.total or time.monotonic() - self.shown >= self.INTERVAL_S

    def show(self, step: int, note: str = "") -> None:
        """Print the line for step ``step`` (from 0)."""
        self.shown = time.monotonic()
        spent = self.shown - self.started
        left = spent / (step + 1) * (self.total - step - 1)
        timing = f"{spent:.0f} s" if step + 1 == self.total else f"{left:.0f} s left"
        print(
            f"[{self.title}] {step + 1}/{self.total}, {timing}" + (f", {note}" if note else ""),
            file=sys.stderr,
            flush=True,
        )

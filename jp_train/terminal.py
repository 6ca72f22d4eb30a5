"""Text for a terminal: tables, durations, progress lines, and keys or reasons of foreign files made safe to print."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import TextIO


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0, 1)) -> list[str]:
    """The rows (the head first) as lines with aligned columns: those numbered in `left` to the left, the others to
    the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return ["  ".join(line).rstrip() for line in lines]


def printable(text: str) -> str:
    """`text` with every control character and lone surrogate escaped: the one would steer the terminal, the other
    cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def duration(seconds: float | None) -> str:
    """`3.2 s`, `42 s`, `12 min 5 s`, `7 h 40 min`, `3 d 4 h`; `-` when unknown."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{min(round(seconds), 59)} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours == 0:
        return f"{minutes} min {int(seconds % 60)} s"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def short_number(value: float) -> str:
    """Three significant digits, with k and M: 0.00012 -> 1.2e-4, 3223 -> 3,223, 12345 -> 12.3k; `nan` and `inf`."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if size >= 999_950:
        return f"{value / 1e6:.3g}M"
    if size >= 9_995:
        return f"{value / 1e3:.3g}k"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def measured(value: float) -> str:
    """A loss, norm or score with the same decimals whatever its size: 0.367, 2.400, 11.52, and short beyond."""
    if value and not 0.01 <= abs(value) < 100:
        return short_number(value)
    return f"{value:.2f}" if abs(value) >= 9.9995 else f"{value:.3f}"


STEP_LINE = re.compile(r"step +\d+/\d+(?=  )")


def folded(line: str, columns: int | None) -> str:
    """A line about a training step, whose fields have two spaces between them, on as many lines as `columns` ask for;
    the later ones are indented. Other lines, and all where `columns` is None, are left as they are."""
    head = STEP_LINE.match(line)
    if head is None or columns is None or len(line) <= columns:
        return line
    return filled([head[0], *line[head.end() + 2 :].split("  ")], columns, joint="  ", indent=4)


def filled(fields: Sequence[str], columns: int, *, joint: str, indent: int) -> str:
    """The fields with `joint` between them on as many lines as `columns` ask for, the later ones indented. A field that
    is longer has a line of its own."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + len(joint) + len(field) <= columns:
            lines[-1] += joint + field
        else:
            lines.append(" " * indent + field)
    return "\n".join(lines)


def shortened(text: str, most: int) -> str:
    """The text on one line, cut between two words and marked with `…` where it has more than `most` characters."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"{line[: most - 1].rpartition(' ')[0] or line[: most - 2]} …"


def terminal_columns(stream: TextIO | int) -> int | None:
    """The width of the terminal that a stream or descriptor writes to, None where that is no terminal or has none."""
    try:
        return os.get_terminal_size(stream if isinstance(stream, int) else stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


_STEADY, _STEADY_S = 0.01, 60.0
"""A time left is told once this share of the work is done, or after so many seconds."""


class ProgressLine:
    """`verify: shard 3/20, 1,200 samples, 40%, 12 s, 18 s left`: a line at most every `every_s`, further apart as the
    work grows long (2 % of the time spent: 250 lines in an hour), and the last one."""

    def __init__(
        self,
        name: str,
        stream: TextIO | None,
        *,
        every_s: float = 0.5,
        done: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream` None: silent. `done`: what an earlier run had done already, which says nothing of this one's
        speed. `clock`: seconds, for tests."""
        self._name, self._stream, self._every_s, self._before, self._clock = name, stream, every_s, done, clock
        self._started = self._shown = clock()

    def show(self, done: float, total: float, *details: str) -> None:
        """Print the line of `done` of `total` when it is due."""
        if self._stream is not None and (text := self.text(done, total, *details)):
            print(text, file=self._stream, flush=True)

    def text(self, done: float, total: float, *details: str) -> str | None:
        """The line, None when it is not due: `done` of `total`, both in the unit that takes the time (bytes, steps),
        as a share and the time left."""
        now = self._clock()
        spent = now - self._started
        if done < total and now - self._shown < max(self._every_s, 0.02 * spent):
            return None
        self._shown = now
        timing = [f"{min(done / total, 1):.0%}" if total else "100%", duration(spent)]
        # before, the start-up would count as slow work: after 2 s, 2 KiB of 16 GiB are 194 days
        is_known = spent >= _STEADY_S or done - self._before >= _STEADY * (total - self._before)
        if self._before < done < total and is_known:
            timing.append(f"{duration(spent * (total - done) / (done - self._before))} left")
        return f"{self._name}: {', '.join([*details, *timing])}"

"""Text for a terminal: aligned tables, and keys or reasons of foreign files made safe to print."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
